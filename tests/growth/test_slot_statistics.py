"""What is measured at the slots is true, costs training not a bit, and is unknown where it was not measured."""

from __future__ import annotations

import math

import pytest
import torch
from small_growth import BATCH, Host, digits, end, epoch, germinate, grower, loss, same, steps, tensors_of

from esperd.growth.compiled import Compiled
from esperd.growth.fork import fork
from esperd.growth.network import GrowingNetwork
from esperd.growth.slot_statistics import MOST, STRIDE, TIMED, SlotWatch
from esperd.growth.streams import forked

MANY = digits(5, BATCH * 6)


def watched(**options):
    grown = grower(**options)
    grown.watch = SlotWatch(grown.network)
    return grown


def many(count):
    """So many batches of the train split and of others."""
    return [(MANY[0][part], MANY[1][part]) for part in torch.split(torch.arange(count * BATCH), BATCH)]


def by_hand(grown, inputs, targets):
    """Root of the mean square, over samples, of the norm of each sample's gradient at what leaves each slot."""
    kept = {}

    def keep(slot):
        def hook(_module, _inputs, output):
            output.retain_grad()
            kept[slot] = output

        return hook

    handles = [grown.network.host.get_submodule(r.slot).register_forward_hook(keep(r.slot)) for r in grown.network.slots]
    loss(grown.network(inputs), targets).mean().backward()
    for handle in handles:
        handle.remove()
    return {slot: float((BATCH * tensor.grad).flatten(1).norm(dim=1).pow(2).mean().sqrt()) for slot, tensor in kept.items()}


def test_the_gradient_is_that_of_one_sample_at_what_leaves_the_slot():
    grown = watched(dropout=0.0)
    first, second = many(2)
    steps(grown, [first])
    twin = fork(grown)
    twin.network.train()
    expected = by_hand(twin, *second)
    steps(grown, [second])
    told = {each.slot: each for each in grown.watch.read(grown.step)}
    assert {slot: each.gradient for slot, each in told.items()} == pytest.approx(expected, rel=1e-5)
    assert [each.steps for each in told.values()] == [1, 1]


def test_it_is_what_leaves_the_slot_its_seeds_counted_in():
    grown = watched(dropout=0.0, incubation="joint")
    first, second, third = many(3)
    steps(grown, [first])
    assert grown.apply(germinate("conv_light", "first")) is None
    grown.watch.begin(grown.step)
    steps(grown, [second])
    twin = fork(grown)
    twin.network.train()
    expected = by_hand(twin, *third)
    steps(grown, [third])
    assert {each.slot: each.gradient for each in grown.watch.read(0)} == pytest.approx(expected, rel=1e-5)


def test_bytes_and_seconds_are_measured_on_the_real_structure():
    grown = watched()
    steps(grown, many(2))
    told = grown.watch.read(grown.step)
    assert [each.slot for each in told] == ["first", "second"]
    assert [each.activation_bytes for each in told] == [4 * 6 * 6 * 4, 6 * 3 * 3 * 4]
    assert all(0.0 < each.seconds < 1.0 for each in told)


def test_the_second_step_after_a_decision_point_is_sampled_and_every_so_many_from_there():
    watch = SlotWatch(grower().network)
    watch.begin(7)
    assert [step for step in range(7, 7 + 2 * STRIDE) if watch.due(step)] == [8, 8 + STRIDE]


def test_so_many_steps_are_sampled_at_most_and_fewer_are_timed():
    grown = watched()
    steps(grown, many(1))
    grown.watch.due = lambda _step: True
    for _ in range(TIMED + 3):
        steps(grown, many(1))
    (place, _) = grown.watch._places
    assert len(place.spans) == TIMED
    del grown.watch.due
    assert grown.watch.due(1)
    grown.watch.begin(0, [[1.0, 1.0]] * MOST)
    assert not grown.watch.due(1)


@pytest.mark.parametrize("incubation", ["lookahead", "straight_through", "frozen_input", "joint"])
def test_training_is_the_same_to_the_bit(incubation):
    ended = []
    for grown in (grower(incubation=incubation), watched(incubation=incubation)):
        with forked(torch.device("cpu")):
            torch.manual_seed(3)
            epoch(grown)
            assert grown.apply(germinate("conv_light", "first")) is None
            for _ in range(3):
                epoch(grown)
        ended.append(grown)
    plain, measured = ended
    assert measured.watch.read(measured.step)
    assert same(tensors_of(plain), tensors_of(measured))
    assert plain.ledger.spent == measured.ledger.spent


def test_nothing_stays_behind_in_the_host():
    grown = watched()
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in grown.network.modules()]
    steps(grown, many(3))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in grown.network.modules()] == before


def test_nothing_stays_behind_either_when_a_pass_fails():
    def failing(_output, _target):
        raise RuntimeError("no loss")

    grown = watched()
    steps(grown, many(1))
    grown.loss = failing
    with pytest.raises(RuntimeError, match="no loss"):
        steps(grown, many(1))
    assert not any(module._forward_pre_hooks for module in grown.network.modules())


def test_what_was_not_measured_is_unknown():
    still = watched(incubation="frozen_input")
    steps(still, many(1))
    end(still)
    assert still.watch.read(still.step) == ()
    assert still.apply(germinate("conv_light", "first")) is None
    steps(still, many(4))
    assert still.watch.read(still.step) == (), "the host made no pass of its own"


def test_a_compiled_program_is_not_looked_into():
    grown = watched()
    grown.runner = Compiled(backend="eager")
    steps(grown, many(3))
    assert grown.watch.read(grown.step) == ()


def test_a_frozen_host_has_no_gradient_to_measure():
    grown = watched()
    grown.network.host.first.requires_grad_(requires_grad=False)
    steps(grown, many(2))
    first, second = grown.watch.read(grown.step)
    assert (first.gradient, first.steps, first.activation_bytes) == (None, 0, 576)
    assert second.gradient > 0.0


def test_a_scaled_loss_is_told_unscaled():
    told = {}
    for precision in ("float32", "float16"):
        grown = watched(dropout=0.0, precision=precision)
        steps(grown, many(2))
        told[precision] = [each.gradient for each in grown.watch.read(grown.step)]
    assert told["float16"] == pytest.approx(told["float32"], rel=0.05)


def test_a_gradient_that_is_no_number_is_left_out():
    watch = SlotWatch(grower().network)
    watch.begin(0, [[math.nan, 1.0], [2.0, math.inf], [4.0, 3.0]])
    first, second = watch.read(0)
    assert (first.gradient, first.steps, second.gradient, second.steps) == (3.0, 2, 2.0, 2)


def test_a_fork_is_not_watched_and_a_trial_leaves_no_trace():
    grown = watched()
    steps(grown, many(2))
    twin = fork(grown)
    assert twin.watch is None
    norms = grown.watch.norms()
    steps(twin, many(4))
    assert grown.watch.norms() == norms


def test_norms_taken_out_and_put_back_go_on_as_if_nothing_had_been():
    grown = watched()
    steps(grown, many(2))
    kept = [list(step) for step in grown.watch.norms()]
    later = SlotWatch(grown.network)
    later.begin(0, kept)
    assert later.norms() == grown.watch.norms()
    assert [each.gradient for each in later.read(0)] == [each.gradient for each in grown.watch.read(0)]


def test_a_network_without_slots_is_not_watched():
    assert not SlotWatch(GrowingNetwork(Host(), ())).due(1)
