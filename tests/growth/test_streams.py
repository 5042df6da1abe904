"""RNG streams: what a second pass draws is drawn from a fork, whichever generator the model uses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from small_growth import GATE, SAMPLES, batches, epoch, germinate, grower, host, loss, same, seed_of, until
from torch import nn

from esperd.growth.contribution import measure
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots
from esperd.growth.streams import Streams, forked
from esperd.growth.trial import controlled_trial
from esperd.messages.growth import Stage

CPU = torch.device("cpu")
GENERATORS = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": lambda: float(np.random.rand())}


class Draws(nn.Module):
    """Scales by a number drawn at every pass."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * (0.5 + self.draw())


def drawing(draw, **options):
    grown = grower(dropout=0.0, **options)
    grown.network.host.dropout = Draws(draw)
    return grown


def seed_everything():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def standing():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


@pytest.mark.parametrize("draw", GENERATORS.values(), ids=GENERATORS)
def test_a_seed_behind_a_host_that_draws_leaves_it_and_the_streams_to_the_bit(draw):
    ends = []
    for seeded in (False, True):
        grown = drawing(draw, incubation_epochs=9)
        if seeded:
            grown.apply(germinate("conv_light", "first"))
            grown.apply(germinate("squeeze_excite", "second"))
        seed_everything()
        grown.network.train()
        for inputs, targets in batches(0) + batches(1):
            grown.train_step(inputs, targets)
        ends.append((dict(grown.network.host.state_dict()), standing()))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("draw", GENERATORS.values(), ids=GENERATORS)
def test_a_seed_that_does_nothing_contributes_nothing_whatever_the_host_draws(draw):
    built = host(dropout=0.0)
    network = GrowingNetwork(built, find_slots(built, GATE[0][:4], patterns=("first",)))
    built.dropout = Draws(draw)
    seed = seed_of(nn.Identity(), network.slots[0])
    network.insert(seed)
    before = standing()
    found = measure(network, [GATE], loss, variants={"without": {seed.name: 0.0}})
    assert float(found.contribution("without", confidence=0.95, epoch=0).loss) == 0.0
    assert standing() == before


def test_a_trial_moves_no_stream_and_its_twins_draw_the_same():
    drawn = []

    def draw():
        drawn.append(random.random())
        return drawn[-1]

    grown = drawing(draw, incubation="joint")
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    grown.network.train()
    before = standing()
    drawn.clear()
    trial = controlled_trial(grown, "first#0", lambda: iter(batches(3) * 9), lambda: [GATE], steps=4)
    assert standing() == before
    assert drawn[:4] == drawn[4:8], "the twin without the seed starts from the same stream"
    assert trial.samples == SAMPLES


@pytest.mark.parametrize("draw", [GENERATORS["python"], GENERATORS["numpy"]], ids=["python", "numpy"])
def test_a_fork_that_leaves_everybodys_streams_out_does_not_move_them_back(draw):
    with forked(CPU, Streams.take(CPU, everybodys=False)):
        before = Streams.take(CPU)
        draw()
        assert before.everybodys_moved()
    assert before.everybodys_moved()
    with forked(CPU):
        draw()
    before = Streams.take(CPU)
    with forked(CPU):
        draw()
    assert not before.everybodys_moved()


def test_a_host_that_draws_from_torch_alone_is_found_out_in_its_trace():
    quiet, restless = drawing(GENERATORS["torch"], incubation_epochs=9), drawing(GENERATORS["numpy"], incubation_epochs=9)
    for grown in (quiet, restless):
        grown.apply(germinate("conv_light", "first"))
        epoch(grown)
    assert (quiet.incubator._draws, restless.incubator._draws) == (False, True)


def test_the_normal_number_that_numpy_keeps_aside_is_part_of_its_stream():
    np.random.randn()
    before = Streams.take(CPU)
    np.random.randn()
    assert before.everybodys_moved()
