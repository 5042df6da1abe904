"""Every extension point. Registering hooks return declarations; observing hooks get keyword arguments.

Hooks are synchronous. A plugin may take fewer arguments than a hook offers. Register a plugin under the entry-point
group ``esperd``.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from esperd.declarations import AlphaSchedule, Blueprint, Dataset, Gate, Host, Strategy, SurgeryOperation, Trigger
from esperd.messages.jobs import JobInfo
from esperd.messages.telemetry import DecisionMade, StageChanged

hookspec = pluggy.HookspecMarker("esperd")
hookimpl = pluggy.HookimplMarker("esperd")


@hookspec
def esperd_blueprints() -> Iterable[Blueprint]:  # type: ignore[empty-body]
    """Kinds of seeds that may be grown."""


@hookspec
def esperd_strategies() -> Iterable[Strategy]:  # type: ignore[empty-body]
    """Ways to choose where, when and what to grow."""


@hookspec
def esperd_triggers() -> Iterable[Trigger]:  # type: ignore[empty-body]
    """Ways to tell when to grow."""


@hookspec
def esperd_gates() -> Iterable[Gate]:  # type: ignore[empty-body]
    """Checks a seed must pass to enter a stage."""


@hookspec
def esperd_surgery_operations() -> Iterable[SurgeryOperation]:  # type: ignore[empty-body]
    """Structural changes a decision may ask for."""


@hookspec
def esperd_hosts() -> Iterable[Host]:  # type: ignore[empty-body]
    """Networks that a job can name."""


@hookspec
def esperd_datasets() -> Iterable[Dataset]:  # type: ignore[empty-body]
    """Data sets that a job can name."""


@hookspec
def esperd_alpha_schedules() -> Iterable[AlphaSchedule]:  # type: ignore[empty-body]
    """Ramps by which alpha moves from 0 to its target."""


@hookspec
def esperd_job_started(job: JobInfo) -> None:
    """A worker began to train a job; called in the daemon."""


@hookspec
def esperd_decision(job: str, decision: DecisionMade) -> None:
    """The policy decided and the trainer applied or refused it; called in the daemon."""


@hookspec
def esperd_stage_changed(job: str, change: StageChanged) -> None:
    """A seed moved to another stage; called in the daemon."""


@hookspec
def esperd_job_finished(job: JobInfo) -> None:
    """A job reached a final state; called in the daemon."""
