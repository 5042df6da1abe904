"""Whether a process that beats is hung all the same: it takes no step, and next to no processor time."""

from __future__ import annotations

SHARE = 0.01
"""Of one processor: who takes as much is at work. A hung trainer takes 0.07 % for its heartbeats, 0.4 % where its job has a limit
of memory that it watches (measured over a minute, on a busy core)."""
LOOK_S = 10.0
"""How often one looks, at most; chosen, not measured."""
LOOKS = 10
"""Looks within a short timeout, at least."""


class Stillness:
    """How long a process has been still.

    Looks are counted, and not time: the daemon, or the machine, may have been the one that slept.

    Args:
        timeout_s: stillness after which it is taken for hung.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.every_s = min(LOOK_S, timeout_s / LOOKS)
        """Seconds between two looks."""
        self._still = 0
        self._used_s = 0.0
        self._before: tuple[int | None, float] | None = None

    @property
    def still_s(self) -> float:
        """Seconds of stillness so far."""
        return self._still * self.every_s

    def look(self, step: int | None, cpu_s: float | None, *, occupied: bool = False) -> bool:
        """Take a look in.

        Args:
            step: its step counter; None: it has none yet.
            cpu_s: processor time that it and its descendants have taken so far; None: nobody can tell, so nobody judges.
            occupied: whether it has a reason to be still that is not its own: it waits for its turn, or for an answer of ours.

        Returns:
            Whether it is hung: over the last ``timeout_s`` seconds it took no step and less than :data:`SHARE` of a processor.
        """
        before, self._before = self._before, None if cpu_s is None else (step, cpu_s)
        if before is None or cpu_s is None or occupied or step != before[0]:
            self._begin_anew()
            return False
        # The sum falls when a descendant ends that its parent does not wait for: that gives nothing back.
        self._used_s += max(0.0, cpu_s - before[1])
        if self._used_s >= SHARE * self.timeout_s:
            self._begin_anew()
            return False
        self._still += 1
        return self._still * self.every_s >= self.timeout_s

    def _begin_anew(self) -> None:
        self._still, self._used_s = 0, 0.0
