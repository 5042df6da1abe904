"""A grower in one call: what a notebook or a script of one's own begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, get_args, get_type_hints

import msgspec
import torch

from esperd.errors import InvalidJob, InvalidOptimizer, UnknownName
from esperd.growth import alpha, gates, surgery
from esperd.growth.alpha import Curve
from esperd.growth.contribution import PerSample
from esperd.growth.distributed import Distributed
from esperd.growth.gates import GateCheck
from esperd.growth.grower import Grower, SurgeryFunction, TrialBatches
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork
from esperd.growth.optimizer import build_optimizer
from esperd.growth.precision import Precision
from esperd.growth.ranks import Alone, Ranks
from esperd.growth.runner import Plain, Runner
from esperd.growth.source import SeedSource
from esperd.growth.streams import device_of
from esperd.messages.jobs import Gates, Growth, Optimizer
from esperd.messages.telemetry import Body

SettingsT = TypeVar("SettingsT", bound=Growth | Gates | Optimizer)

GATE_CHECKS: dict[str, GateCheck] = {
    "G0": gates.existence,
    "G1": gates.fitness,
    "G2": gates.readiness,
    "G3": gates.completion,
    "G4": gates.stability,
    "G5": gates.proof,
}
"""The built-in gates."""

OPERATIONS: dict[str, SurgeryFunction] = {
    "germinate": surgery.germinate,
    "fossilize": surgery.fossilize,
    "cull": surgery.cull,
    "set_alpha": surgery.set_alpha,
    "trial": surgery.trial,
}
"""The built-in surgery operations."""

CURVES: dict[str, Curve] = {
    "linear": alpha.linear,
    "cosine": alpha.cosine,
    "sigmoid": alpha.sigmoid,
    "tanh": alpha.tanh,
}
"""The built-in alpha schedules."""


def assemble(
    network: GrowingNetwork,
    source: SeedSource,
    *,
    loss: PerSample,
    steps_per_epoch: int,
    metric: PerSample | None = None,
    optimizer: Optimizer | None = None,
    growth: Growth | None = None,
    settings: Gates | None = None,
    precision: Precision | None = None,
    runner: Runner | None = None,
    batches: TrialBatches | None = None,
    emit: Callable[[Body], None] | None = None,
    ranks: Ranks | None = None,
) -> Grower:
    """A grower with the built-in gates, operations and alpha schedules.

    Args:
        network: host and slots; on the device it trains on.
        source: makes seeds, for example :class:`esperd.growth.source.BlueprintSource`.
        loss: (output, target) → (B,) one loss per sample.
        steps_per_epoch: optimiser steps between two decision points; ramps and warm-ups are given in epochs.
        metric: (output, target) → (B,) or None.
        optimizer: which one and its rates; None: AdamW at 3e-3.
        growth: mode of incubation, operator, how long stages last; None: the defaults.
        settings: thresholds of the gates; None: the defaults.
        precision: of training passes; None: float32.
        runner: runs the host's own passes; None: as it is, or :class:`~esperd.growth.distributed.Distributed` among ``ranks``.
        batches: what controlled trials train on and are judged by; None: none can be run.
        emit: takes events as they happen; None: nobody does.
        ranks: the processes that grow this network together, :class:`~esperd.growth.ranks.Joined`; None: this one alone.

    Raises:
        InvalidJob: a setting is mistyped or out of range; names its key.
        InvalidModel: no parameter of the host requires a gradient.
        InvalidOptimizer: the user's own optimiser cannot be carried through growth, or an optimiser was given in place of its
            settings.
        UnknownName: no alpha schedule has this name.
    """
    _require_settings(optimizer)
    if steps_per_epoch < 1:
        raise InvalidJob(f"steps_per_epoch is {steps_per_epoch}; an epoch has at least one step", key="steps_per_epoch")
    growth, settings = _checked("growth", growth, Growth), _checked("settings", settings, Gates)
    optimizer = _checked("optimizer", optimizer, Optimizer)
    return Grower(
        network=network,
        optimizer=build_optimizer(optimizer, network.host.parameters()),
        loss=loss,
        metric=metric,
        growth=growth,
        settings=settings,
        gates=GATE_CHECKS,
        operations=OPERATIONS,
        curve=_curve(growth.alpha_schedule),
        source=source,
        ledger=Ledger(),
        emit=emit or _nobody,
        precision=precision or Precision("float32", device_of(network)),
        max_gradient_norm=optimizer.max_gradient_norm,
        runner=runner or (Plain() if ranks is None else Distributed(ranks)),
        batches=batches,
        ranks=ranks or Alone(),
        steps_per_epoch=steps_per_epoch,
    )


def _require_settings(optimizer: object) -> None:
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise InvalidOptimizer(
            f"assemble builds the optimiser itself, over host and seeds, and was given a {kind}; give "
            "settings: Optimizer(name='adam', learning_rate=1e-3) of esperd.messages.jobs, or name='module:function' for yours",
            optimizer=kind,
        )


def _checked(argument: str, given: SettingsT | None, kind: type[SettingsT]) -> SettingsT:
    """Settings as strictly as a job file's are read: Structs do not check what they are made of."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise InvalidJob(
            f"{argument} is a {type(given).__name__}; it takes {kind.__name__}(...) of esperd.messages.jobs", key=argument
        )
    # what a user's own optimiser takes need be no plain data in a program of one's own
    own = {"options": given.options} if isinstance(given, Optimizer) else {}
    try:
        values = msgspec.to_builtins(msgspec.structs.replace(given, **{key: {} for key in own}))
        return msgspec.structs.replace(msgspec.convert(values, kind), **own)
    except (TypeError, msgspec.ValidationError) as error:
        problem, _, path = str(error).partition(" - at `$.")
        path = path.rstrip("`")
        key = path.partition(".")[0].partition("[")[0]
        took = f"{kind.__name__}({key}={getattr(given, key)!r})" if key else kind.__name__
        choices = get_args(get_type_hints(kind).get(key)) if problem.startswith("Invalid enum value") else ()
        listed = f"; there are: {', '.join(map(repr, choices))}" if choices else f" at {path}" if path != key else ""
        raise InvalidJob(
            f"{argument}={took}: {problem[:1].lower()}{problem[1:]}{listed} (docs/job.md says what each key takes)",
            key=f"{argument}.{path}" if path else argument,
        ) from error


def _curve(name: str) -> Curve:
    if name not in CURVES:
        raise UnknownName(
            f"no alpha schedule is called {name!r}; there are: {', '.join(CURVES)}", kind="alpha_schedules", name=name
        )
    return CURVES[name]


def _nobody(_body: Body) -> None:
    """Nobody listens."""
