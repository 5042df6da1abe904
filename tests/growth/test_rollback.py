"""Rollbacks: a grower that went back to a snapshot goes on as if nothing had happened since, to the bit."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_growth import Kernels, batches, end, epoch, germinate, grower, same, steps, tensors_of, until
from torch import nn

from esperd.errors import CheckpointRejected
from esperd.growth.grower import Grower
from esperd.growth.lifecycle import CullRequested
from esperd.growth.optimizer import set_learning_rate
from esperd.growth.rollback import STANDING_FIELDS, Restored, Snapshot
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Optimizer
from esperd.messages.policy import Decision
from esperd.messages.reports import SeedOutcome
from esperd.messages.telemetry import StageChanged

EPOCHS = 14
CONTINUED = 2
"""Epochs that are trained twice from each point."""
DECISIONS = {
    1: germinate("conv_light", "first"),
    2: germinate("squeeze_excite", "second"),
    9: Decision(action="cull", seed="second#1", reason="it does not pay"),
    10: Decision(action="fossilize", seed="first#0", reason="it pays"),
    11: germinate("norm", "first"),
    13: germinate("bottleneck", "second"),
}
MODES = {
    "sgd-lookahead": (Optimizer(name="sgd", learning_rate=0.05), "lookahead"),
    "adamw-lookahead": (Optimizer(name="adamw", learning_rate=0.02), "lookahead"),
    "adamw-joint": (Optimizer(name="adamw", learning_rate=0.02), "joint"),
}
FIRST_EPOCH = {"sgd-lookahead": 0, "adamw-lookahead": 1, "adamw-joint": 0}
"""Each mode goes back to every second epoch from here on, together to every one."""
TOLERANT = Gates(min_contribution=-100.0, max_loss_drift=10.0, max_loss_spike=10.0)


def fresh(mode: str = "adamw-lookahead", events: list | None = None, *, portable: bool = False) -> Grower:
    """Seeds run as plain modules, which no checkpoint can hold, unless ``portable``."""
    optimizer, incubation = MODES[mode]
    torch.manual_seed(7)
    return grower(
        events,
        optimizer=optimizer,
        incubation=incubation,
        incubation_epochs=2,
        blending_epochs=2,
        shadowing_epochs=2,
        probation_epochs=4,
        embargo_epochs=1,
        learning_rate_scale=0.5,
        settings=TOLERANT,
        source=Kernels(portable=portable),
    )


def standing(grown: Grower) -> tuple[dict[str, torch.Tensor], object]:
    """What two growers must agree on: all but what was spent, and how many seeds there ever were."""
    numbers = (
        grown.records(),
        tuple(grown.outcomes),
        grown.epoch,
        grown.step,
        grown.gate_loss,
        grown.gate_pass.fused,
        {name: list(window) for name, window in grown.windows.items()},
        {name: (part.ratio.read(), part.passes) for name, part in grown.incubator.gathered.items()},
        sorted(grown.resting),
        dict(grown.ledger.costs),
        grown.precision.state(),
        [(group["name"], group["lr"], group["scale"]) for group in grown.optimizer.param_groups],
        [(name, module.training) for name, module in grown.network.named_modules()],
    )
    return tensors_of(grown), numbers


def agree(first: tuple[dict[str, torch.Tensor], object], second: tuple[dict[str, torch.Tensor], object]) -> bool:
    return same(first[0], second[0]) and first[1] == second[1]


def run_epoch(grown: Grower) -> None:
    set_learning_rate(grown.optimizer, 0.02 * 0.9**grown.epoch, grown.step)
    steps(grown, batches(grown.epoch))
    end(grown)
    if grown.epoch in DECISIONS:
        assert grown.apply(DECISIONS[grown.epoch]) is None


def at_epoch(wanted: int, mode: str = "adamw-lookahead", events: list | None = None, **options) -> Grower:
    """A grower that followed the script so far."""
    grown = fresh(mode, events, **options)
    while grown.epoch < wanted:
        run_epoch(grown)
    return grown


@dataclass(frozen=True)
class Kept:
    """A snapshot, and what a rollback does not bring back; tests of their own say why."""

    snapshot: Snapshot[None]
    germinated: int
    outcomes: tuple[SeedOutcome, ...]

    @classmethod
    def of(cls, grown: Grower) -> Kept:
        return cls(Snapshot.take(grown, cursor=None), grown.network.germinated, tuple(grown.outcomes))

    def restore_into(self, grown: Grower) -> None:
        """Go back, and let the names of the seeds that are gone be given again: the same names make the same seeds."""
        self.snapshot.restore_into(grown)
        grown.network.germinated, grown.outcomes = self.germinated, list(self.outcomes)


def wreck(grown: Grower) -> None:
    """What a catastrophe leaves."""
    set_learning_rate(grown.optimizer, 1e6, grown.step)
    steps(grown, batches(grown.epoch)[:2])
    with torch.no_grad():
        for tensor in (*grown.network.parameters(), *grown.network.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)


@pytest.mark.parametrize("mode", MODES)
def test_a_grower_that_was_rolled_back_from_anywhere_goes_on_to_the_bit(mode):
    grown = at_epoch(FIRST_EPOCH[mode], mode)
    while grown.epoch < EPOCHS:
        kept, stood = Kept.of(grown), standing(grown)
        undisturbed = []
        for _ in range(CONTINUED):
            run_epoch(grown)
            undisturbed.append(standing(grown))
        wreck(grown)
        kept.restore_into(grown)
        assert agree(standing(grown), stood), f"epoch {grown.epoch}"
        for expected in undisturbed:
            run_epoch(grown)
            assert agree(standing(grown), expected), f"epoch {grown.epoch} from {kept.snapshot.epoch}: {grown.records()}"


def test_the_gradient_scaler_goes_back():
    grown = grower(precision="float16")
    steps(grown, batches(0)[:2])
    kept, scaler = Snapshot.take(grown, cursor=None), grown.precision.state()
    wreck(grown)
    assert grown.precision.state() != scaler
    kept.restore_into(grown)
    assert grown.precision.state() == scaler


@pytest.mark.parametrize("mode", MODES)
def test_taking_a_snapshot_changes_nothing(mode):
    watched = fresh(mode)
    for _ in range(6):
        Snapshot.take(watched, cursor=None)
        run_epoch(watched)
    assert agree(standing(watched), standing(at_epoch(6, mode)))


def test_a_snapshot_can_be_gone_back_to_again_and_again():
    grown = at_epoch(6)
    kept, stood = Snapshot.take(grown, cursor=None), standing(grown)
    for _ in range(3):
        run_epoch(grown)
        wreck(grown)
        kept.restore_into(grown)
        assert agree(standing(grown), stood)


def test_a_seed_that_germinated_after_the_snapshot_is_culled_and_has_its_outcome():
    events: list = []
    grown = at_epoch(4, events=events)
    grown.occur(grown.network.seed("second#1"), CullRequested("to make room"))
    while "second" in grown.resting:
        run_epoch(grown)
    kept = Snapshot.take(grown, cursor=None)
    assert grown.apply(germinate("norm", "second")) is None
    run_epoch(grown)
    events.clear()
    restored = kept.restore_into(grown)
    assert restored.gone == ("second#2",)
    assert [seed.name for seed in grown.network.seeds()] == ["first#0"]
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host", "first#0"]
    assert not grown.resting, "the slot is as free as it was"
    reason = f"the network went back to epoch {kept.epoch}, before it germinated"
    outcome = grown.outcomes[-1]
    assert (outcome.seed, outcome.stage, outcome.reason, outcome.ended_epoch) == (
        "second#2",
        Stage.CULLED,
        reason,
        kept.epoch + 1,
    )
    (told,) = events
    assert isinstance(told, StageChanged)
    assert (told.seed, told.after, told.reason) == ("second#2", Stage.CULLED, reason)


def test_the_name_of_a_seed_that_is_gone_is_not_given_again():
    grown = at_epoch(0)
    run_epoch(grown)
    kept = Snapshot.take(grown, cursor=None)
    run_epoch(grown)
    assert kept.restore_into(grown).gone == ("second#1",)
    grown.apply(germinate("norm", "second"))
    assert [seed.name for seed in grown.network.seeds()] == ["first#0", "second#2"]


def test_seeds_that_ended_after_the_snapshot_live_again_and_have_no_outcome():
    grown = at_epoch(8)
    kept, stages = Snapshot.take(grown, cursor=None), {record.seed: record.stage for record in grown.records()}
    assert set(kept.live_seeds) == {"first#0", "second#1"}
    while grown.epoch < 10:
        run_epoch(grown)
    assert {outcome.seed: outcome.stage for outcome in grown.outcomes} == {
        "second#1": Stage.CULLED,
        "first#0": Stage.FOSSILIZED,
    }
    restored = kept.restore_into(grown)
    assert restored == Restored(cursor=None, epoch=8, gone=(), returned=("first#0", "second#1"))
    assert {record.seed: record.stage for record in grown.records()} == stages
    assert grown.outcomes == []


def test_a_seed_that_is_gone_although_it_was_fossilized_is_told_as_culled():
    grown = grower(source=Kernels(portable=False), settings=TOLERANT)
    epoch(grown)
    kept = Snapshot.take(grown, cursor=None)
    grown.apply(germinate("norm", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    epoch(grown)
    assert grown.apply(Decision(action="fossilize", seed="first#0", reason="it pays")) is None
    assert kept.restore_into(grown).gone == ("first#0",)
    (outcome,) = grown.outcomes
    assert (outcome.stage, outcome.reason) == (Stage.CULLED, f"the network went back to epoch {kept.epoch}, before it germinated")
    assert list(grown.network.seeds()) == []


def test_a_slot_that_rested_at_the_snapshot_rests_again():
    grown = at_epoch(9)
    kept, stood = Kept.of(grown), standing(grown)
    assert list(grown.resting) == ["second"]
    while grown.resting:
        run_epoch(grown)
    kept.restore_into(grown)
    assert agree(standing(grown), stood)
    assert grown.resting["second"].name == "second#1"


def test_what_was_spent_stays_spent():
    grown = at_epoch(3)
    kept = Snapshot.take(grown, cursor=None)
    run_epoch(grown)
    spent = dict(grown.ledger.spent)
    wreck(grown)
    spent_in_vain = grown.ledger.total
    assert spent_in_vain > sum(spent.values())
    kept.restore_into(grown)
    assert grown.ledger.total == spent_in_vain


def test_every_random_stream_goes_back():
    grown = at_epoch(1)
    kept = Snapshot.take(grown, cursor=None)

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn()

    random.gauss(0, 1)  # leaves the second of its pair in the stream
    first = draw()
    kept.restore_into(grown)
    random.gauss(0, 1)
    assert draw() == first


class Counting(nn.Module):
    """Keeps a running value outside of the state_dict, and a buffer that each pass replaces."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.register_buffer("latest", None)

    def forward(self, x):
        self.passes += 1
        self.latest = x.detach().mean()
        return self.module(x)


def test_buffers_outside_the_state_dict_and_replaced_ones_go_back():
    grown = grower(source=Kernels(wrap=Counting, portable=False))
    grown.network.host.head = Counting(grown.network.host.head)
    counting = grown.network.host.head
    kept = Snapshot.take(grown, cursor=None)
    epoch(grown)
    middle = Snapshot.take(grown, cursor=None)
    passes, latest = counting.passes.clone(), counting.latest.clone()
    epoch(grown)
    middle.restore_into(grown)
    assert torch.equal(counting.passes, passes)
    assert torch.equal(counting.latest, latest)
    kept.restore_into(grown)
    assert counting.passes == 0
    assert counting.latest is None


def test_a_module_that_was_exchanged_comes_back():
    grown = at_epoch(3)
    kept, stood = Snapshot.take(grown, cursor=None), standing(grown)
    grown.network.seed("first#0").module = nn.Identity()
    grown.network.host.head = nn.Linear(6, 3)
    kept.restore_into(grown)
    assert agree(standing(grown), stood)


def test_what_was_frozen_since_trains_again():
    grown = at_epoch(3)
    kept = Snapshot.take(grown, cursor=None)
    grown.network.host.head.weight.requires_grad_(requires_grad=False)
    grown.network.host.first.eval()
    kept.restore_into(grown)
    assert grown.network.host.head.weight.requires_grad
    assert all(module.training for module in grown.network.modules())
    assert all(parameter.grad is None for parameter in grown.network.parameters())


def test_a_learning_rate_that_is_a_tensor_goes_back_as_often_as_needed():
    grown = grower()
    grown.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    kept = Snapshot.take(grown, cursor=None)
    for _ in range(2):
        grown.optimizer.param_groups[0]["lr"].fill_(9.0)
        kept.restore_into(grown)
        assert float(grown.optimizer.param_groups[0]["lr"]) == 0.25


def test_tied_weights_stay_tied():
    grown = grower()
    grown.network.host.head.bias = nn.Parameter(torch.zeros(3))
    grown.network.host.twin = grown.network.host.head
    kept = Snapshot.take(grown, cursor=None)
    with torch.no_grad():
        grown.network.host.head.bias.fill_(5.0)
    kept.restore_into(grown)
    assert grown.network.host.twin is grown.network.host.head
    assert torch.equal(grown.network.host.head.bias, torch.zeros(3))


def test_portable_seeds_roll_back_as_plain_ones_do():
    grown = at_epoch(3, portable=True)
    kept = Kept.of(grown)
    run_epoch(grown)
    expected = standing(grown)
    wreck(grown)
    kept.restore_into(grown)
    run_epoch(grown)
    assert agree(standing(grown), expected)


def test_a_cursor_is_handed_back_as_it_was_given():
    grown = at_epoch(1)
    cursor = {"batch": 3, "gate_losses": [1.0]}
    assert Snapshot.take(grown, cursor).restore_into(grown).cursor is cursor


def test_another_grower_is_refused():
    kept = Snapshot.take(at_epoch(1), cursor=None)
    with pytest.raises(CheckpointRejected, match="taken of another grower"):
        kept.restore_into(at_epoch(1))


def test_every_field_of_a_grower_is_rolled_back_or_known_to_stand():
    """A new field is rolled back without anybody's doing; one that must not be is to be named in ``STANDING_FIELDS``."""
    names = {field.name for field in dataclasses.fields(Grower)}
    assert names >= STANDING_FIELDS
    assert Snapshot.take(at_epoch(1), cursor=None).fields.keys() == names - STANDING_FIELDS
