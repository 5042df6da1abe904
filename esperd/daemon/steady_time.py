"""Whether the wall clock can be believed: what is deleted for its age may not go because a clock jumped."""

from __future__ import annotations

from collections.abc import Callable

import structlog

MOST_DRIFT_S = 60.0
"""By how much wall time may differ from what passed, between two looks. A slewed clock stays within it; chosen."""

log = structlog.get_logger()


class SteadyTime:
    """Compares two looks at two clocks.

    Args:
        wall: seconds since the epoch.
        monotonic: seconds that passed.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset: float | None = None

    def holds(self) -> bool:
        """True when the wall clock went on as time did since the last look; False at the first one, and after a jump."""
        offset = self._wall() - self._monotonic()
        before, self._offset = self._offset, offset
        if before is None:
            return False
        if abs(offset - before) <= MOST_DRIFT_S:
            return True
        log.warning("the wall clock jumped: nothing is deleted for its age until it goes on steadily", seconds=offset - before)
        return False
