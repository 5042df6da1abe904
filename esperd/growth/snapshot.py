"""Everything a grower knows, as data: one Struct and one flat dictionary of tensors. Restoring it continues to the bit."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from torch import nn

from esperd.errors import CheckpointRejected
from esperd.growth.alpha import Ramp
from esperd.growth.grower import Grower
from esperd.growth.incubation import Sharing
from esperd.growth.lifecycle import Life
from esperd.growth.network import Presence, Seed
from esperd.growth.operators import operator
from esperd.growth.optimizer import HOST_GROUP, add_group, host_group
from esperd.growth.optimizer_state import GroupState, describe, put
from esperd.messages.growth import Contribution, SeedRecord, SlotRecord, Stage, Trial, Verdict
from esperd.messages.reports import SeedOutcome

Rebuild = Callable[[str], nn.Module]
"""Portable graph → module with the same parameter names, weights to be loaded."""


class SeedState(msgspec.Struct, frozen=True, kw_only=True):
    """One seed, without its tensors."""

    name: str
    blueprint: str
    slot: SlotRecord
    parameters: int
    flops_per_sample: float
    epoch: int
    kernel: str | None
    graph: str | None
    operator: str
    stage: Stage
    epochs_in_stage: int
    reason: str
    leaving: bool
    alpha: float
    alpha_target: float
    presence: Presence
    isolated: bool
    screening: str
    ramp_start: float
    ramp_target: float
    ramp_steps: int
    ramp_done: int
    ramp_curve: str
    contribution: Contribution | None
    prospect: Contribution | None
    trial: Trial | None
    verdict: Verdict | None
    gradient_ratio: float | None
    incubation_loss: float | None
    activation_bytes: float | None = None


class GrowerState(msgspec.Struct, frozen=True, kw_only=True):
    """A grower, without its tensors."""

    slots: tuple[SlotRecord, ...]
    seeds: tuple[SeedState, ...]
    resting: tuple[SeedState, ...]
    germinated: int
    outcomes: tuple[SeedOutcome, ...]
    windows: dict[str, list[float]]
    incubations: dict[str, int]
    """Second passes since the epoch began, by seed in TRAINING."""
    sharing: dict[str, Sharing]
    """How second passes run, by slot."""
    groups: tuple[GroupState, ...]
    """The optimiser's groups, in order."""
    epoch: int
    step: int
    gate_loss: float | None
    measured_at: int | None = None
    """Epoch of that."""
    fused: bool | None
    fusing_tried: tuple[str, ...]
    """Seeds for which it is known whether passes may be stacked."""
    scaler: tuple[float, int] | None
    """Scale and age of the gradient scaler; None where there is none."""
    spent: dict[str, float]
    costs: dict[str, float]
    screened_out: tuple[SeedRecord, ...] = ()
    """Of whom the policy was not told yet."""


def take(grower: Grower) -> tuple[GrowerState, dict[str, torch.Tensor]]:
    """Describe a grower.

    Returns:
        Its state, and its tensors by name:
        ``model.*``, ``buffer.*``, ``optimizer.<group>.*`` (:func:`esperd.growth.optimizer_state.describe`),
        ``incubation.<seed>.*``. The tensors are the live ones: write them before the next step.

    Raises:
        CheckpointRejected: a seed runs as a plain module, so nothing could rebuild it.
        InvalidOptimizer: the optimiser keeps what is neither a tensor nor a plain value.
    """
    plain = [seed.name for seed in grower.network.seeds() if seed.graph is None]
    if plain:
        raise CheckpointRejected(f"seeds {', '.join(plain)} have no portable kernel, so they could not be rebuilt", seeds=plain)
    tensors = {f"model.{name}": tensor for name, tensor in grower.network.state_dict().items()}
    tensors |= {f"buffer.{name}": buffer for name, buffer in _unsaved_buffers(grower)}
    groups, remembered = describe(grower.optimizer)
    tensors |= remembered
    for seed, gathered in grower.incubator.gathered.items():
        if gathered.ratio.sums is not None:
            tensors[f"incubation.{seed}.sums"] = gathered.ratio.sums
        if gathered.loss_sum is not None:
            tensors[f"incubation.{seed}.loss_sum"] = gathered.loss_sum
    state = GrowerState(
        slots=grower.network.slots,
        seeds=tuple(_seed_state(seed) for seed in grower.network.seeds()),
        resting=tuple(_seed_state(seed) for seed in grower.resting.values()),
        germinated=grower.network.germinated,
        outcomes=tuple(grower.outcomes),
        windows={name: list(window) for name, window in grower.windows.items()},
        incubations={name: gathered.passes for name, gathered in grower.incubator.gathered.items()},
        sharing=dict(grower.incubator.sharing),
        groups=groups,
        epoch=grower.epoch,
        step=grower.step,
        gate_loss=grower.gate_loss,
        measured_at=grower.measured_at,
        fused=grower.gate_pass.fused,
        fusing_tried=tuple(sorted(grower.gate_pass.tried)),
        scaler=grower.precision.state(),
        spent=dict(grower.ledger.spent),
        costs=dict(grower.ledger.costs),
        screened_out=tuple(grower.screened_out),
    )
    return state, tensors


def restore(grower: Grower, state: GrowerState, tensors: dict[str, torch.Tensor], rebuild: Rebuild) -> None:
    """Bring a fresh grower (same host, same slots, no seeds, no step taken) to a saved state.

    Raises:
        CheckpointRejected: the state does not fit the host: other slots, other parameter names or shapes, other
            ones that train.
    """
    if grower.network.slots != state.slots:
        raise CheckpointRejected(
            "the checkpoint was taken of a host with other slots: "
            f"{[slot.slot for slot in state.slots]}, now {[slot.slot for slot in grower.network.slots]}"
        )
    seeds = [_rebuild_seed(saved, rebuild) for saved in state.seeds]
    device = next(grower.network.parameters()).device
    for seed in seeds:
        grower.network.insert(seed.to(device))
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        grower.network.load_state_dict(model)
    except RuntimeError as error:
        raise CheckpointRejected(f"the checkpoint does not fit the host: {error}") from error
    with torch.no_grad():
        for name, buffer in _unsaved_buffers(grower):
            if f"buffer.{name}" not in tensors:
                raise CheckpointRejected(f"the checkpoint does not fit the host: it has no buffer {name}")
            buffer.copy_(tensors[f"buffer.{name}"])
    _restore_optimizer(grower, state, tensors, {seed.name: seed for seed in seeds})
    grower.resting = {saved.slot.slot: _rebuild_seed(saved, lambda _graph: nn.Identity()) for saved in state.resting}
    for name, passes in state.incubations.items():
        gathered = grower.incubator.incubation(grower.network.seed(name))
        gathered.ratio.sums = tensors.get(f"incubation.{name}.sums")
        gathered.loss_sum, gathered.passes = tensors.get(f"incubation.{name}.loss_sum"), passes
    grower.incubator.sharing = dict(state.sharing)
    grower.network.germinated = state.germinated
    grower.outcomes, grower.screened_out = list(state.outcomes), list(state.screened_out)
    grower.windows = {name: list(window) for name, window in state.windows.items()}
    grower.epoch, grower.step = state.epoch, state.step
    grower.gate_loss, grower.measured_at = state.gate_loss, state.measured_at
    grower.gate_pass.fused, grower.gate_pass.tried = state.fused, set(state.fusing_tried)
    grower.precision.restore(state.scaler)
    grower.ledger.spent, grower.ledger.costs = dict(state.spent), dict(state.costs)


def vacate(grower: Grower) -> None:
    """Take every seed out, and forget what the optimiser remembers: the grower can be brought to another saved state of its own
    host by :func:`restore`. Seeds that somebody else holds, a snapshot for a rollback say, are left as they are.
    """
    for seed in list(grower.network.seeds()):
        grower.network.remove(seed.name)
    grower.optimizer.param_groups[:] = [host_group(grower.optimizer)]
    grower.optimizer.state.clear()
    grower.resting, grower.windows, grower.incubator.gathered = {}, {}, {}


def _unsaved_buffers(grower: Grower) -> list[tuple[str, torch.Tensor]]:
    """Buffers registered with ``persistent=False``: no part of a state_dict, but of the training's state."""
    saved = grower.network.state_dict().keys()
    return [(name, buffer) for name, buffer in grower.network.named_buffers() if name not in saved]


def _restore_optimizer(grower: Grower, state: GrowerState, tensors: dict[str, torch.Tensor], seeds: dict[str, Seed]) -> None:
    for saved in state.groups:
        if saved.name != HOST_GROUP:
            add_group(grower.optimizer, saved.name, seeds[saved.name].parameters(), saved.values["scale"])
    put(grower.optimizer, state.groups, tensors)


def _seed_state(seed: Seed) -> SeedState:
    return SeedState(
        name=seed.name,
        blueprint=seed.blueprint,
        slot=seed.record,
        parameters=seed.parameters_added,
        flops_per_sample=seed.flops_per_sample,
        epoch=seed.epoch,
        kernel=seed.kernel,
        graph=seed.graph,
        operator=seed.operator_name,
        stage=seed.life.stage,
        epochs_in_stage=seed.life.epochs_in_stage,
        reason=seed.life.reason,
        leaving=seed.life.leaving,
        alpha=seed.alpha,
        alpha_target=seed.alpha_target,
        presence=seed.presence,
        isolated=seed.isolated,
        screening=seed.screening,
        ramp_start=seed.ramp.start,
        ramp_target=seed.ramp.target,
        ramp_steps=seed.ramp.steps,
        ramp_done=seed.ramp.done,
        ramp_curve=seed.ramp.curve,
        contribution=seed.contribution,
        prospect=seed.prospect,
        trial=seed.trial,
        verdict=seed.verdict,
        gradient_ratio=seed.gradient_ratio,
        incubation_loss=seed.incubation_loss,
        activation_bytes=seed.activation_bytes,
    )


def _rebuild_seed(saved: SeedState, rebuild: Rebuild) -> Seed:
    seed = Seed(
        name=saved.name,
        blueprint=saved.blueprint,
        module=rebuild(saved.graph or ""),
        record=saved.slot,
        parameters_added=saved.parameters,
        flops_per_sample=saved.flops_per_sample,
        epoch=saved.epoch,
        kernel=saved.kernel,
        graph=saved.graph,
        operator=operator(saved.operator, saved.slot),
        operator_name=saved.operator,
        alpha_target=saved.alpha_target,
    )
    seed.life = Life(stage=saved.stage, epochs_in_stage=saved.epochs_in_stage, reason=saved.reason, leaving=saved.leaving)
    seed.ramp = Ramp(
        start=saved.ramp_start,
        target=saved.ramp_target,
        steps=saved.ramp_steps,
        done=saved.ramp_done,
        curve=saved.ramp_curve,
    )
    seed.alpha = saved.alpha
    seed.presence, seed.isolated, seed.screening = saved.presence, saved.isolated, saved.screening
    seed.contribution, seed.prospect, seed.trial = saved.contribution, saved.prospect, saved.trial
    seed.verdict = saved.verdict
    seed.gradient_ratio = saved.gradient_ratio
    seed.incubation_loss = saved.incubation_loss
    seed.activation_bytes = saved.activation_bytes
    return seed
