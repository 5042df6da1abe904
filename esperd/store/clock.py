"""The one seam for wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch. Tests pass their own."""

system_clock: Clock = time.time
