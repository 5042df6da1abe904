"""Faults on demand inside of the processes of a daemon: clocks that jump, an event loop that stands still.

``ESPERD_CHAOS=orders=FOLDER`` has every process look there. Whoever hurts it writes there with :class:`Orders`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

CLOCK = "clock"
BLOCK = "block"
LOOK_S = 0.05


class Orders:
    """What is asked of the processes of a daemon.

    Args:
        folder: named in ``ESPERD_CHAOS``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set_clock(self, offset_s: float) -> None:
        """Have the wall clock of every process be off by so many seconds, from now on."""
        self._write(CLOCK, offset_s)

    def block(self, seconds: float) -> None:
        """Have the daemon's event loop stand still once, as soon as it has begun a job."""
        self._write(BLOCK, seconds)

    def clock(self) -> float:
        """By how many seconds the wall clock is off."""
        try:
            return float((self.folder / CLOCK).read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0.0

    @property
    def blocks(self) -> bool:
        """Whether somebody was asked to stand still and has not heard it."""
        return (self.folder / BLOCK).exists()

    def take_block(self) -> float | None:
        """How long to stand still; None: no more."""
        try:
            seconds = float((self.folder / BLOCK).read_text(encoding="ascii"))
            (self.folder / BLOCK).unlink()
        except FileNotFoundError:
            return None
        return seconds

    def _write(self, name: str, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f"{name}.fresh"
        fresh.write_text(repr(seconds), encoding="ascii")
        fresh.rename(self.folder / name)  # read by others at any moment: whole, or not there


def bend_the_clock(orders: Orders) -> None:
    """Have this process's ``time.time`` and ``time.time_ns`` be off as the orders say. What reads a clock in C is not reached."""
    true_s, true_ns = time.time, time.time_ns
    time.time = lambda: true_s() + orders.clock()
    time.time_ns = lambda: true_ns() + int(orders.clock() * 1e9)


def block_when_told(orders: Orders) -> None:
    """Watch for orders to stand still, from the loop that runs now."""
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while not loop.is_closed():
            if (seconds := orders.take_block()) is not None:
                with contextlib.suppress(RuntimeError):  # it was closed in this moment
                    loop.call_soon_threadsafe(time.sleep, seconds)
            time.sleep(LOOK_S)

    threading.Thread(target=watch, name="chaos orders", daemon=True).start()
