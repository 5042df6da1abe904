"""The one seam for wall-clock time."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch: ``time.time``, or what a test passes."""
