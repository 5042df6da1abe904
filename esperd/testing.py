"""What plugin authors and our own tests use: time that moves when it is told to."""

from __future__ import annotations

import anyio
import anyio.lowlevel


class FakeClock:
    """A clock that stands still until :meth:`advance`.

    Args:
        monotonic: first reading, in seconds.
        wall: first reading, in seconds since the epoch.
    """

    def __init__(self, monotonic: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self._monotonic

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self._wall

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has been advanced by ``seconds``."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        sleeper = (self._monotonic + seconds, anyio.Event())
        self._sleepers.append(sleeper)
        try:
            await sleeper[1].wait()
        finally:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)

    def advance(self, seconds: float) -> None:
        """Move both readings forward and wake whoever has slept long enough, in the order of their waking."""
        self._monotonic += seconds
        self._wall += seconds
        due = sorted((sleeper for sleeper in self._sleepers if sleeper[0] <= self._monotonic), key=lambda item: item[0])
        for sleeper in due:
            self._sleepers.remove(sleeper)
            sleeper[1].set()

    @property
    def sleeping(self) -> int:
        """How many wait for time to pass."""
        return len(self._sleepers)
