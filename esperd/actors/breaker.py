"""Circuit breakers: a service that failed so often in a row is left alone for a while, then tried with one request.

The states are those of M. Nygard, *Release It!* (2nd ed., 2018), ch. 5. The machine is pure: values in, values out, time as an
argument. An answer counts only in the era in which its request was let through, so that what was asked before the circuit opened
does not close it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import assert_never

from esperd.errors import CircuitOpen, EsperError
from esperd.messages.control import BreakerState, BreakerStatus


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a circuit opens, and for how long."""

    failures: int
    """In a row."""
    reset_s: float


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """Where a circuit stands."""

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    """In a row."""
    opened_at: float = 0.0
    """Monotonic seconds; means something while it is not closed."""
    era: int = 0
    """Grows with every change of state."""


def ask(circuit: Circuit, now: float, limits: Limits) -> tuple[Circuit, bool]:
    """Whether a request may go through now; the one that finds an open circuit after its time is the probe."""
    match circuit.state:
        case BreakerState.CLOSED:
            return circuit, True
        case BreakerState.OPEN:
            if now - circuit.opened_at < limits.reset_s:
                return circuit, False
            return replace(circuit, state=BreakerState.HALF_OPEN, era=circuit.era + 1), True
        case BreakerState.HALF_OPEN:
            return circuit, False
        case _:
            assert_never(circuit.state)


def succeed(circuit: Circuit, era: int) -> Circuit:
    """A request of this era was answered."""
    if era != circuit.era:
        return circuit
    closed = circuit.state is BreakerState.CLOSED
    return Circuit(era=circuit.era if closed else circuit.era + 1)


def fail(circuit: Circuit, era: int, now: float, limits: Limits) -> Circuit:
    """A request of this era failed."""
    if era != circuit.era:
        return circuit
    failures = circuit.failures + 1
    if circuit.state is BreakerState.CLOSED and failures < limits.failures:
        return replace(circuit, failures=failures)
    return Circuit(state=BreakerState.OPEN, failures=failures, opened_at=now, era=circuit.era + 1)


def give_up(circuit: Circuit, era: int) -> Circuit:
    """A request of this era ended without saying anything of the service: it was cancelled. The next one is the probe."""
    if era != circuit.era or circuit.state is not BreakerState.HALF_OPEN:
        return circuit
    return replace(circuit, state=BreakerState.OPEN, era=circuit.era + 1)


class Breaker:
    """A circuit in use. Safe to share between threads.

    Args:
        service: its name, for people.
        limits: when it opens.
        clock: monotonic seconds.
        counts: errors that speak against the service. Any other error is an answer.
        changed: told of every change of state.
    """

    def __init__(
        self,
        service: str,
        limits: Limits,
        clock: Callable[[], float],
        counts: tuple[type[EsperError], ...],
        changed: Callable[[BreakerStatus], None] | None = None,
    ) -> None:
        self.service = service
        self._limits = limits
        self._clock = clock
        self._counts = counts
        self._changed = changed
        self._circuit = Circuit()
        self._last_error = ""
        self._opened = 0
        self._lock = threading.Lock()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Ask the service inside this block.

        Raises:
            CircuitOpen: on entering, while the service is left alone.
        """
        with self._lock:
            circuit, may = ask(self._circuit, self._clock(), self._limits)
            era = circuit.era
            self._become(circuit)
        if not may:
            raise self._refusal()
        try:
            yield
        except self._counts as error:
            self._last_error = f"{error.code}: {error}"
            self._settle(lambda before: fail(before, era, self._clock(), self._limits))
            raise
        except Exception:
            self._settle(lambda before: succeed(before, era))
            raise
        except BaseException:
            self._settle(lambda before: give_up(before, era))
            raise
        else:
            self._settle(lambda before: succeed(before, era))

    def status(self) -> BreakerStatus:
        """Where it stands."""
        circuit = self._circuit
        waits = circuit.opened_at + self._limits.reset_s - self._clock()
        return BreakerStatus(
            service=self.service,
            state=circuit.state,
            failures=circuit.failures,
            opened=self._opened,
            retry_after_s=max(0.0, waits) if circuit.state is BreakerState.OPEN else None,
            last_error=self._last_error or None,
        )

    def _settle(self, move: Callable[[Circuit], Circuit]) -> None:
        with self._lock:
            self._become(move(self._circuit))

    def _become(self, circuit: Circuit) -> None:
        before, self._circuit = self._circuit, circuit
        if before.state is circuit.state:
            return
        self._opened += circuit.state is BreakerState.OPEN
        if self._changed is not None:
            self._changed(self.status())

    def _refusal(self) -> CircuitOpen:
        found = self.status()
        wait_s = found.retry_after_s or 0.0
        tried = "one request tries it now" if found.state is BreakerState.HALF_OPEN else f"it is asked again in {wait_s:.0f} s"
        return CircuitOpen(
            f"{self.service} failed {found.failures} times in a row (last: {self._last_error}); {tried}",
            service=self.service,
            failures=found.failures,
            retry_after_s=wait_s,
        )
