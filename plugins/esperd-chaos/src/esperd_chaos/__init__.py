"""Faults inside a running daemon, named in ``ESPERD_CHAOS``; see the README. Without the variable nothing happens."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esperd import hookimpl
from esperd.messages.jobs import JobInfo
from esperd.messages.telemetry import DecisionMade, StageChanged
from esperd.testing import children_of
from esperd_chaos.orders import Orders, bend_the_clock, block_when_told

VARIABLE = "ESPERD_CHAOS"


@dataclass(frozen=True)
class Plan:
    """What goes wrong.

    Args:
        kill_s: mean seconds between two lost processes; None: none is lost.
        block_s: seconds for which a decision blocks the event loop; None: it does not.
        raises: whether observing hooks raise.
        orders: folder in which faults are asked for; None: nobody asks.
        seed: of the draws; None: fresh ones.
    """

    kill_s: float | None = None
    block_s: float | None = None
    raises: bool = False
    orders: Path | None = None
    seed: int | None = None


def plan_from(text: str) -> Plan:
    """``kill=30,block=0.5,raise,seed=1`` as a plan.

    Raises:
        ValueError: names the word that is wrong, and the ones that there are.
    """
    plan = Plan()
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = word.partition("=")
        if name not in READ or (name == "raise") != (not value):
            raise ValueError(
                f"{VARIABLE}: {word!r} names no fault; there are kill=SECONDS, block=SECONDS, orders=FOLDER, raise and seed=N"
            )
        field, read = READ[name]
        plan = replace(plan, **{field: read(value)})
    return plan


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"{VARIABLE}: {value!r} is no number of seconds above 0")
    return seconds


READ: dict[str, tuple[str, Callable[[str], Any]]] = {
    "kill": ("kill_s", _seconds),
    "block": ("block_s", _seconds),
    "orders": ("orders", Path),
    "seed": ("seed", int),
    "raise": ("raises", lambda _value: True),
}
"""Words of the variable: the field each sets, and how its value is read."""


class Chaos:
    """Does what a plan says, to the process it lives in and to the processes that it started."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._rng = random.Random(plan.seed)  # noqa: S311 - faults are no secrets
        self._killing: threading.Thread | None = None
        self._orders: Orders | None = None
        if plan.orders is not None:
            bend_the_clock(Orders(plan.orders))

    @hookimpl
    def esperd_job_started(self, job: JobInfo) -> None:
        """Begin to kill, and to listen for orders."""
        if self.plan.orders is not None and self._orders is None:
            self._orders = Orders(self.plan.orders)
            block_when_told(self._orders)
        if self.plan.kill_s is not None and self._killing is None:
            self._killing = threading.Thread(target=self._kill_for_ever, args=(self.plan.kill_s,), daemon=True)
            self._killing.start()
        self._maybe_raise(f"job {job.id} started")

    @hookimpl
    def esperd_decision(self, job: str, decision: DecisionMade) -> None:
        """Block the loop that this is called on."""
        if self.plan.block_s is not None:
            time.sleep(self.plan.block_s)
        self._maybe_raise(f"decision {decision.point} of job {job}")

    @hookimpl
    def esperd_stage_changed(self, job: str, change: StageChanged) -> None:
        """Raise, if that is the plan."""
        self._maybe_raise(f"seed {change.seed} of job {job} moved")

    @hookimpl
    def esperd_job_finished(self, job: JobInfo) -> None:
        """Raise, if that is the plan."""
        self._maybe_raise(f"job {job.id} finished")

    def _maybe_raise(self, what: str) -> None:
        if self.plan.raises:
            raise RuntimeError(f"chaos, as {VARIABLE} says: {what}")

    def _kill_for_ever(self, mean_s: float) -> None:
        while True:
            time.sleep(self._rng.expovariate(1.0 / mean_s))
            children = children_of(os.getpid())
            if children:
                victim = self._rng.choice(children)
                if victim.is_alive:
                    os.kill(victim.pid, signal.SIGKILL)


_chaos = Chaos(plan_from(os.environ.get(VARIABLE, "")))
esperd_job_started = _chaos.esperd_job_started
esperd_decision = _chaos.esperd_decision
esperd_stage_changed = _chaos.esperd_stage_changed
esperd_job_finished = _chaos.esperd_job_finished
