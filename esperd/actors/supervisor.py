"""Who is started, stopped and restarted, and when to give up. Pure: events and the time in, instructions out.

The shell (:mod:`esperd.actors.system`) starts and stops things and reports what happened; every decision is made here.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from esperd.messages.control import ActorState

Strategy = Literal["one_for_one", "rest_for_one", "one_for_all"]
"""Who is restarted when an actor crashes: it alone; it and all that were started after it; everybody."""

Restart = Literal["permanent", "transient", "temporary"]
"""After which ends an actor is started again: all; crashes; none."""

STOPPED = "stopped"
"""Reason of an end that was asked for."""
FINISHED_KEPT = 100
"""Actors that ended for good and are still listed; the oldest are forgotten first."""
MAX_DOUBLINGS = 60
"""Beyond it a power of two says nothing more, and one day overflows."""


@dataclass(frozen=True, kw_only=True)
class RestartLimits:
    """How often and how fast an actor is restarted. Sources: OTP's supervisor (intensity and period), longer here because
    an actor may load a model; exponential backoff with full jitter.

    Args:
        max_restarts: crashes within ``within_s`` that are forgiven; one more escalates.
        within_s: the window.
        backoff_s: upper bound of the first wait; it doubles with every crash.
        backoff_max_s: largest upper bound.
        stable_after_s: an incarnation that lived this long starts the doubling afresh.
    """

    max_restarts: int = 3
    within_s: float = 30.0
    backoff_s: float = 0.1
    backoff_max_s: float = 30.0
    stable_after_s: float = 60.0


# --- what happened -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Add:
    """A new actor, to be started at once.

    ``forgive_start`` says that a first incarnation that fails before it has started is treated like any crash; otherwise
    the actor is given up, because somebody waits to hear that it started.
    """

    name: str
    restart: Restart
    forgive_start: bool = False


@dataclass(frozen=True)
class Started:
    """An incarnation is ready for messages."""

    name: str
    generation: int


@dataclass(frozen=True)
class Exited:
    """An incarnation is gone. ``expected``: it ended well by itself, or was asked to stop."""

    name: str
    generation: int
    reason: str
    expected: bool


@dataclass(frozen=True)
class StopRequested:
    """Stop an actor for good; without a name: all of them, the last started first, one after the other."""

    name: str | None = None


@dataclass(frozen=True)
class Tick:
    """Time has passed; see :meth:`Supervisor.next_due`."""


Event = Add | Started | Exited | StopRequested | Tick


# --- what to do ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Start this incarnation."""

    name: str
    generation: int


@dataclass(frozen=True)
class Stop:
    """Stop this incarnation; it answers with :class:`Exited`."""

    name: str
    generation: int


@dataclass(frozen=True)
class NotifyWatchers:
    """Tell whoever watches that an incarnation ended."""

    name: str
    generation: int
    reason: str
    will_restart: bool


@dataclass(frozen=True)
class Escalate:
    """An actor crashed more often than its limits allow. The system must end."""

    name: str
    reason: str


Instruction = Start | Stop | NotifyWatchers | Escalate


class Phase(enum.Enum):
    """Where a child stands, finer than what is shown."""

    STARTING = ActorState.STARTING
    RUNNING = ActorState.RUNNING
    STOPPING = "stopping"
    """Asked to end, for good or to be restarted with the others; still there."""
    WAITING = ActorState.WAITING
    STOPPED = ActorState.STOPPED
    FAILED = ActorState.FAILED


_ALIVE = frozenset({Phase.STARTING, Phase.RUNNING, Phase.STOPPING})


@dataclass
class Child:
    """What is known of one actor. Written by the supervisor only."""

    name: str
    restart: Restart
    forgive_start: bool
    phase: Phase = Phase.STARTING
    generation: int = 0
    restarts: int = 0
    """Incarnations that were started after an earlier one ended."""
    last_error: str | None = None
    due: float = 0.0
    """When a waiting child is started."""
    waits_for: tuple[str, ...] = ()
    """A waiting child is started once all of these run: the earlier members of a group that restarts together."""
    comes_back: bool = False
    """Whether a stopping child is started again."""
    started_at: float = 0.0
    crashes: deque[float] = field(default_factory=deque)
    """Times of recent crashes, oldest first."""
    streak: int = 0
    """Crashes since it was last stable."""

    @property
    def state(self) -> ActorState:
        """As shown to people: an actor that is being stopped still runs."""
        return ActorState.RUNNING if self.phase is Phase.STOPPING else ActorState(self.phase.value)

    @property
    def is_alive(self) -> bool:
        """Whether an incarnation exists."""
        return self.phase in _ALIVE


class Supervisor:
    """The state machine. Mutated by :meth:`handle` only.

    Args:
        strategy: who is restarted with whom.
        limits: how often and how fast.
        rng: source of the jitter.
    """

    def __init__(self, strategy: Strategy = "one_for_one", limits: RestartLimits | None = None, *, rng: random.Random) -> None:
        self.strategy = strategy
        self.limits = limits or RestartLimits()
        self._rng = rng
        self._children: dict[str, Child] = {}
        self._stopping_all = False

    def child(self, name: str) -> Child | None:
        """What is known of an actor; None: nothing, or not any more."""
        return self._children.get(name)

    def children(self) -> tuple[Child, ...]:
        """Everybody, in the order they were first started."""
        return tuple(self._children.values())

    def next_due(self) -> float | None:
        """When the next :class:`Tick` can start somebody; None: there is nothing to wait for."""
        return min((child.due for child in self._children.values() if self._may_start(child)), default=None)

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take an event in and return what to do about it, in order.

        Args:
            event: what happened. One that speaks of an older generation is void.
            now: monotonic seconds.

        Raises:
            ValueError: when an actor is added under the name of one that has not ended.
        """
        match event:
            case Add():
                return self._add(event, now)
            case Started(name, generation):
                return self._started(name, generation, now)
            case Exited():
                return self._exited(event, now)
            case StopRequested():
                return self._stop_all() if event.name is None else self._stop_for_good(event.name)
            case Tick():
                return self._start_due(now)

    def _add(self, event: Add, now: float) -> list[Instruction]:
        known = self._children.get(event.name)
        if known is not None and known.phase not in (Phase.STOPPED, Phase.FAILED):
            raise ValueError(f"an actor called {event.name!r} exists already, it is {known.state}")
        if self._stopping_all:
            raise ValueError(f"cannot start {event.name!r}: everything is being stopped")
        self._children.pop(event.name, None)  # so that it takes its new place in the order
        child = Child(event.name, event.restart, event.forgive_start, generation=known.generation if known else 0)
        self._children[event.name] = child
        self._forget_oldest_finished()
        return [self._start(child, now)]

    def _started(self, name: str, generation: int, now: float) -> list[Instruction]:
        child = self._current(name, generation)
        if child is None or child.phase is not Phase.STARTING:
            return []
        child.phase = Phase.RUNNING
        child.started_at = now
        return self._start_due(now)

    def _exited(self, event: Exited, now: float) -> list[Instruction]:
        child = self._current(event.name, event.generation)
        if child is None or not child.is_alive:
            return []
        if not event.expected:
            child.last_error = event.reason
        if child.phase is Phase.STOPPING or self._stopping_all:
            return self._end_of_stopping(child, event, now)
        if self._restarts(child, event):
            return self._crashed(child, event, now)
        child.phase = Phase.STOPPED if event.expected else Phase.FAILED
        self._forget_oldest_finished()
        return [self._notify(child, event.reason)]

    def _restarts(self, child: Child, event: Exited) -> bool:
        if child.phase is Phase.STARTING and child.restarts == 0 and not child.forgive_start:
            return False
        return child.restart == "permanent" or (child.restart == "transient" and not event.expected)

    def _crashed(self, child: Child, event: Exited, now: float) -> list[Instruction]:
        """An end that calls for a restart. An ordinary end of a permanent actor counts, too: it must not spin."""
        limits = self.limits
        if child.phase is Phase.RUNNING and now - child.started_at >= limits.stable_after_s:
            child.streak = 0
        child.crashes.append(now)
        while now - child.crashes[0] > limits.within_s:
            child.crashes.popleft()
        if len(child.crashes) > limits.max_restarts:
            child.phase = Phase.FAILED
            reason = f"ended {len(child.crashes)} times within {limits.within_s:g} s, the last time: {event.reason}"
            return [self._notify(child, event.reason), Escalate(child.name, reason)]
        bound_s = min(limits.backoff_max_s, limits.backoff_s * 2.0 ** min(child.streak, MAX_DOUBLINGS))
        child.streak += 1
        self._wait(child, now + self._rng.uniform(0.0, bound_s))
        instructions: list[Instruction] = [self._notify(child, event.reason)]
        for sibling in reversed(self._affected_by(child)):
            instructions += self._take_down(sibling, child.due)
        self._chain()
        return instructions

    def _affected_by(self, child: Child) -> list[Child]:
        """Siblings that restart with a crashed one, in start order."""
        if self.strategy == "one_for_one":
            return []
        everybody = list(self._children.values())
        if self.strategy == "rest_for_one":
            everybody = everybody[everybody.index(child) + 1 :]
        return [sibling for sibling in everybody if sibling is not child]

    def _take_down(self, child: Child, due: float) -> Iterator[Instruction]:
        if child.phase is Phase.WAITING:
            child.due = max(child.due, due)
        elif child.phase in (Phase.STARTING, Phase.RUNNING):
            child.phase = Phase.STOPPING
            child.comes_back = child.restart != "temporary"
            child.due = due
            yield Stop(child.name, child.generation)

    def _chain(self) -> None:
        """Under a group strategy whoever comes back waits for the earlier ones, so that a group starts in its order."""
        if self.strategy == "one_for_one":
            return
        earlier: list[str] = []
        for child in self._children.values():
            if child.phase is Phase.WAITING or (child.phase is Phase.STOPPING and child.comes_back):
                child.waits_for = tuple(earlier)
                earlier.append(child.name)

    def _end_of_stopping(self, child: Child, event: Exited, now: float) -> list[Instruction]:
        if child.comes_back and not self._stopping_all:
            self._wait(child, child.due)
            return [self._notify(child, event.reason), *self._start_due(now)]
        child.phase = Phase.STOPPED
        self._forget_oldest_finished()
        instructions: list[Instruction] = [self._notify(child, event.reason)]
        instructions += self._stop_last() if self._stopping_all else self._start_due(now)
        return instructions

    def _stop_for_good(self, name: str) -> list[Instruction]:
        child = self._children.get(name)
        if child is None:
            return []
        child.comes_back = False
        if child.phase is Phase.WAITING:
            child.phase = Phase.STOPPED
            return [self._notify(child, STOPPED)]
        if child.phase in (Phase.STARTING, Phase.RUNNING):
            child.phase = Phase.STOPPING
            return [Stop(child.name, child.generation)]
        return []

    def _stop_all(self) -> list[Instruction]:
        """Who waits for a restart is stopped already; the others follow one by one."""
        self._stopping_all = True
        waiting = [child.name for child in self._children.values() if child.phase is Phase.WAITING]
        ended = [instruction for name in waiting for instruction in self._stop_for_good(name)]
        return [*ended, *self._stop_last()]

    def _stop_last(self) -> list[Instruction]:
        """Stop the child that was started last, unless one is being stopped already."""
        alive = [child for child in self._children.values() if child.is_alive]
        for child in alive:
            child.comes_back = False
        if not alive or alive[-1].phase is Phase.STOPPING:
            return []
        return self._stop_for_good(alive[-1].name)

    def _start_due(self, now: float) -> list[Instruction]:
        return [self._start(child, now) for child in self._children.values() if self._may_start(child) and child.due <= now]

    def _may_start(self, child: Child) -> bool:
        """Whether only time keeps it waiting. An earlier member of its group that ended for good is not waited for, one
        that must come down first is.
        """
        if child.phase is not Phase.WAITING or self._stopping_all:
            return False
        if self.strategy == "one_for_one":
            return True
        if any(other.phase is Phase.STOPPING and other.comes_back for other in self._children.values()):
            return False
        members = (self._children.get(name) for name in child.waits_for)
        return all(
            member is None or member.phase in (Phase.RUNNING, Phase.STOPPED, Phase.FAILED, Phase.STOPPING) for member in members
        )

    def _start(self, child: Child, now: float) -> Start:
        if child.phase is Phase.WAITING:
            child.restarts += 1
        child.phase = Phase.STARTING
        child.generation += 1
        child.started_at = now
        child.waits_for = ()
        return Start(child.name, child.generation)

    def _wait(self, child: Child, due: float) -> None:
        child.phase = Phase.WAITING
        child.due = due

    def _notify(self, child: Child, reason: str) -> NotifyWatchers:
        return NotifyWatchers(child.name, child.generation, reason, will_restart=child.phase is Phase.WAITING)

    def _current(self, name: str, generation: int) -> Child | None:
        child = self._children.get(name)
        return child if child is not None and child.generation == generation else None

    def _forget_oldest_finished(self) -> None:
        finished = [child for child in self._children.values() if child.phase in (Phase.STOPPED, Phase.FAILED)]
        for child in finished[: max(0, len(finished) - FINISHED_KEPT)]:
            del self._children[child.name]
