"""Snapshots: a grower restored at any point of any seed's life goes on to the bit."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import msgspec
import pytest
import safetensors.torch
import torch
from small_growth import Kernels, batches, end, germinate, grower, same, steps, tensors_of
from torch import nn

from esperd.errors import CheckpointRejected, KernelRejected
from esperd.execution.oplist import load_kernel
from esperd.growth.grower import Grower
from esperd.growth.network import GrowingNetwork
from esperd.growth.optimizer import build_optimizer, set_learning_rate
from esperd.growth.snapshot import GrowerState, restore, take
from esperd.messages.growth import SeedRecord, Stage
from esperd.messages.jobs import CoAdaptation, Gates, Optimizer
from esperd.messages.policy import Arm, Decision
from esperd.messages.reports import SeedOutcome

EPOCHS = 16
CONTINUED = 2
"""Epochs that both go on for after a snapshot."""
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
SHARE_OF_PLACES = {"sgd-lookahead": slice(0, None, 2), "adamw-lookahead": slice(1, None, 2), "adamw-joint": slice(0, None, 2)}
"""Where each mode is restored: at every second place, together everywhere. What a place is made of differs little by mode."""
OTHER_MODES = {
    "straight_through, warm-up, multiply": {
        "incubation": "straight_through",
        "operator": "multiply",
        "warmup_epochs": 1.5,
        "optimizer": Optimizer(name="sgd", learning_rate=0.02, nesterov=True),
    },
    "frozen_input": {"incubation": "frozen_input"},
    "float16": {"incubation": "lookahead", "precision": "float16"},
    "float16, gate, no co-adaptation": {
        "incubation": "joint",
        "precision": "float16",
        "operator": "gate",
        "co_adaptation": CoAdaptation(cnn=False),
    },
    "fused, clipped": {
        "incubation": "joint",
        "optimizer": Optimizer(name="adamw", learning_rate=0.02, implementation="fused", max_gradient_norm=0.5),
    },
    "counting": {"incubation": "lookahead", "optimizer": Optimizer(name=f"{__name__}:Counting", learning_rate=0.02)},
    "screening, frozen_input": {"incubation": "frozen_input", "screening": "a"},
    "screening, joint": {"incubation": "joint", "screening": "a"},
}


class Counting(torch.optim.Optimizer):
    """Keeps what it counts in its groups, and whole numbers by parameter, as optimisers without a schedule do."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "taken": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    held = self.state[parameter]
                    held["met"] = held.get("met", 0) + 1
                    rate = group["lr"] / (1 + 0.01 * group["taken"] + 0.01 * held["met"])
                    parameter.sub_(parameter.grad, alpha=rate)


@dataclass(frozen=True)
class Standing:
    """What two growers must agree on."""

    tensors: dict[str, torch.Tensor]
    records: tuple[SeedRecord, ...]
    outcomes: tuple[SeedOutcome, ...]
    numbers: tuple[object, ...]


@dataclass(frozen=True)
class Saved:
    """A snapshot as it lies on disk, with the place in the data and the random stream it belongs to."""

    state: bytes
    tensors: bytes
    rng: torch.Tensor
    epoch: int
    batch: int
    losses: tuple[float, ...]


def fresh(mode: str) -> Grower:
    optimizer, incubation = MODES[mode]
    return grower(
        optimizer=optimizer,
        incubation=incubation,
        incubation_epochs=2,
        blending_epochs=2,
        shadowing_epochs=2,
        probation_epochs=4,
        embargo_epochs=1,
        learning_rate_scale=0.5,
        settings=Gates(min_contribution=-100.0, max_loss_drift=10.0, max_loss_spike=10.0),
    )


def standing(grown: Grower) -> Standing:
    return Standing(
        tensors=tensors_of(grown),
        records=grown.records(),
        outcomes=tuple(grown.outcomes),
        numbers=(
            grown.epoch,
            grown.step,
            grown.gate_loss,
            grown.gate_pass.fused,
            set(grown.gate_pass.tried),
            dict(grown.incubator.sharing),
            dict(grown.ledger.spent),
            dict(grown.ledger.costs),
            {name: list(window) for name, window in grown.windows.items()},
            {name: (part.ratio.read(), part.passes) for name, part in grown.incubator.gathered.items()},
            grown.network.germinated,
            sorted(grown.resting),
            list(grown.screened_out),
            grown.precision.state(),
            [group["name"] for group in grown.optimizer.param_groups],
        ),
    )


def equal(first: Standing, second: Standing) -> bool:
    return same(first.tensors, second.tensors) and (first.records, first.outcomes, first.numbers) == (
        second.records,
        second.outcomes,
        second.numbers,
    )


def save(grown: Grower, batch: int = 0, losses: tuple[float, ...] = ()) -> Saved:
    state, tensors = take(grown)
    written = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return Saved(msgspec.msgpack.encode(state), written, torch.get_rng_state(), grown.epoch, batch, losses)


def load(saved: Saved, mode: str) -> Grower:
    return load_into(fresh(mode), saved)


def load_into(grown: Grower, saved: Saved) -> Grower:
    state = msgspec.msgpack.decode(saved.state, type=GrowerState)
    restore(grown, state, safetensors.torch.load(saved.tensors), lambda graph: load_kernel(graph.encode(), None))
    torch.set_rng_state(saved.rng)
    return grown


def run_epoch(grown: Grower, saved: list[Saved] | None = None, batch: int = 0, losses: tuple[float, ...] = ()) -> None:
    """One epoch of the script, from any batch; ``saved`` gets a snapshot from its end, and of odd epochs from the middle."""
    set_learning_rate(grown.optimizer, 0.02 * 0.9**grown.epoch, grown.step)
    chosen, done = batches(grown.epoch), list(losses)
    for index in range(batch, len(chosen)):
        done += steps(grown, chosen[index : index + 1])
        if saved is not None and index == 1 and grown.epoch % 2:
            saved.append(save(grown, 2, tuple(done)))
    end(grown)
    if grown.epoch in DECISIONS:
        assert grown.apply(DECISIONS[grown.epoch]) is None
    if saved is not None:
        saved.append(save(grown))


@functools.cache
def undisturbed(mode: str) -> tuple[list[Standing], list[Saved]]:
    """The whole script without interruption: where it stood after each epoch, and snapshots along the way."""
    grown, standings, saved = fresh(mode), [], []
    torch.manual_seed(7)
    standings.append(standing(grown))
    saved.append(save(grown))
    for _ in range(EPOCHS):
        run_epoch(grown, saved)
        standings.append(standing(grown))
    return standings, saved


@pytest.mark.parametrize("mode", MODES)
def test_the_script_passes_through_every_stage(mode):
    standings, _ = undisturbed(mode)
    seen = {record.stage for stand in standings for record in stand.records}
    assert seen == set(Stage) - {Stage.GERMINATED, Stage.DORMANT}, "these two last no epoch"


@pytest.mark.parametrize("mode", MODES)
def test_a_grower_restored_anywhere_goes_on_to_the_bit(mode):
    standings, snapshots = undisturbed(mode)
    assert len(snapshots) == 1 + EPOCHS + EPOCHS // 2
    for saved in snapshots[SHARE_OF_PLACES[mode]]:
        torch.manual_seed(12345)
        grown = load(saved, mode)
        run_epoch(grown, batch=saved.batch, losses=saved.losses) if saved.batch else None
        until = min(saved.epoch + CONTINUED, EPOCHS)
        while grown.epoch < until:
            run_epoch(grown)
        place = f"epoch {saved.epoch}, batch {saved.batch}, seeds {[str(record.stage) for record in grown.records()]}"
        assert equal(standing(grown), standings[grown.epoch]), place


def test_a_restored_grower_stands_where_the_saved_one_stood():
    standings, snapshots = undisturbed("adamw-lookahead")
    for saved in snapshots:
        if not saved.batch:
            assert equal(standing(load(saved, "adamw-lookahead")), standings[saved.epoch])


def other(mode: str) -> Grower:
    options = dict(OTHER_MODES[mode])
    options.pop("screening", None)
    optimizer = options.pop("optimizer", Optimizer(name="adamw", learning_rate=0.02))
    tolerant = Gates(min_contribution=-100.0, max_loss_drift=10.0, max_loss_spike=10.0, min_gradient_ratio=0.0)
    return grower(optimizer=optimizer, settings=tolerant, screening_epochs=2, blending_epochs=2, **options)


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_in_every_mode_a_grower_restored_in_the_middle_of_an_epoch_goes_on_to_the_bit(mode):
    """First when a seed incubates, or a screening is on; then two epochs later, when it is heard, or the winner incubates."""
    screening = OTHER_MODES[mode].get("screening", "")
    arms = [("conv_light", "first"), ("norm", "first"), ("squeeze_excite", "second")][: 3 if screening else 1]
    torch.manual_seed(7)
    grown, seen = other(mode), []
    run_other_epoch(grown)
    for blueprint, slot in arms:
        arm = Arm(slot=slot, blueprint=blueprint)
        assert grown.apply(Decision(action="germinate", arm=arm, screening=screening, reason="a test wants it")) is None
    for place in (1, 2, 3):
        steps(grown, batches(grown.epoch)[:2])
        saved = save(grown, 2)
        seen.append({(str(record.stage), bool(record.screening)) for record in grown.records()})
        run_other_epoch(grown, 2)
        if place != 2:
            expected, stream = standing(grown), torch.get_rng_state()
            torch.manual_seed(12345)
            again = load_into(other(mode), saved)
            run_other_epoch(again, 2)
            assert equal(standing(again), expected), f"{place}: {seen[-1]}"
            torch.set_rng_state(stream)
    later = "training" if screening else "shadowing" if OTHER_MODES[mode]["incubation"] == "joint" else "blending"
    assert (seen[0], seen[2]) == ({("training", bool(screening))}, {(later, False)})


def run_other_epoch(grown: Grower, batch: int = 0) -> None:
    steps(grown, batches(grown.epoch)[batch:])
    end(grown)


def test_a_state_is_not_moved_by_what_the_grower_does_next():
    (saved,) = [saved for saved in undisturbed("adamw-lookahead")[1] if (saved.epoch, saved.batch) == (7, 0)]
    grown = load(saved, "adamw-lookahead")
    assert grown.windows, "one seed is in SHADOWING"
    state, _ = take(grown)
    written = msgspec.json.encode(state)
    run_epoch(grown)
    assert msgspec.json.encode(state) == written


def test_a_seed_that_runs_as_a_plain_module_cannot_be_saved():
    grown = grower(source=Kernels(portable=False))
    grown.apply(germinate("norm", "first"))
    with pytest.raises(CheckpointRejected, match="first#0 have no portable kernel"):
        take(grown)
    grown.close()
    take(grown)


def tampered(**changes) -> tuple[GrowerState, dict[str, torch.Tensor]]:
    saved = undisturbed("sgd-lookahead")[1][-1]
    state = msgspec.structs.replace(msgspec.msgpack.decode(saved.state, type=GrowerState), **changes)
    return state, safetensors.torch.load(saved.tensors)


def rebuild(graph: str) -> nn.Module:
    return load_kernel(graph.encode(), None)


def test_a_snapshot_of_a_host_with_other_slots_is_refused():
    state, tensors = tampered()
    grown = fresh("sgd-lookahead")
    with pytest.raises(CheckpointRejected, match=r"other slots: \['first'\], now \['first', 'second'\]"):
        restore(grown, msgspec.structs.replace(state, slots=state.slots[:1]), tensors, rebuild)
    assert list(grown.network.seeds()) == []


class Wider(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)


def test_a_snapshot_of_another_host_is_refused():
    state, tensors = tampered()
    grown = fresh("sgd-lookahead")
    grown.network = GrowingNetwork(Wider(), state.slots)
    grown.optimizer = build_optimizer(Optimizer(), grown.network.parameters())
    with pytest.raises(CheckpointRejected, match=r"(?s)does not fit the host.*first\.weight"):
        restore(grown, state, tensors, rebuild)


def test_a_snapshot_with_a_seed_whose_graph_is_not_allowed_is_refused():
    state, tensors = tampered()
    seeds = tuple(msgspec.structs.replace(seed, graph='{"format":1}') for seed in state.seeds)
    with pytest.raises(KernelRejected):
        restore(fresh("sgd-lookahead"), msgspec.structs.replace(state, seeds=seeds), tensors, rebuild)
