"""Room on the disk: when there is too little, the daemon admits and trains nothing more, keeps what it has, and waits.

Two thresholds, because they ask for different things. *Low*: there is still room for what runs now to end well, so workers
checkpoint. *Full*: a write was refused, so the reserve is given up and only ends are recorded.
"""

from __future__ import annotations

import enum
from pathlib import Path

import structlog

from esperd.config import Storage
from esperd.errors import ReadOnly
from esperd.store.filesystem import Filesystem, RealFilesystem
from esperd.store.reserve import Reserve

RESERVE_FILE = "reserve"
RETRY_AFTER_S = 10.0
"""When a refused submission may try again; chosen, not measured."""
RETURN_SHARE = 1.1
"""Free bytes over the threshold from which work goes on, so that a job's own checkpoints do not turn it off and on; chosen, not
measured."""

log = structlog.get_logger()


class Level(enum.StrEnum):
    """How much room there is."""

    OK = "ok"
    LOW = "low"
    """Less than ``storage.min_free_bytes``."""
    FULL = "full"
    """A write was refused, or less than the reserve is left."""


def next_level(before: Level, free_bytes: int, *, refused: bool, reserve_held: bool, settings: Storage) -> Level:
    """Where the disk stands, as a pure function.

    Args:
        before: where it stood.
        free_bytes: what may still be written.
        refused: a write was refused for want of space since the last look.
        reserve_held: whether the reserve is taken; what a missing one will need again is no free space.
        settings: thresholds.
    """
    usable = free_bytes if reserve_held else free_bytes - settings.reserve_bytes
    if refused or free_bytes < settings.reserve_bytes:
        return Level.FULL
    enough = settings.min_free_bytes if before is Level.OK else settings.min_free_bytes * RETURN_SHARE
    if usable >= enough:
        return Level.OK
    return Level.LOW if before is Level.OK else before


class Space:
    """The room there is for one state directory, and the reserve in it. Synchronous.

    Args:
        directory: the state directory.
        settings: thresholds.
        filesystem: the disk; tests pass one that fills up.
    """

    def __init__(self, directory: Path, settings: Storage, filesystem: Filesystem | None = None) -> None:
        self._directory = directory
        self._settings = settings
        self._filesystem: Filesystem = filesystem or RealFilesystem()
        self._reserve = Reserve(directory / RESERVE_FILE, settings.reserve_bytes, self._filesystem)
        self._refused = False
        self.level = Level.OK
        self.free_bytes: int | None = None
        """At the last look; None before the first, and when it could not be read."""

    @property
    def trouble(self) -> str:
        """Why nothing new is taken; empty when it is."""
        if self.level is Level.OK:
            return ""
        found = "unknown" if self.free_bytes is None else f"{self.free_bytes:,} bytes"
        return (
            f"read-only: the disk of {self._directory} is {self.level} (free: {found}, storage.min_free_bytes ="
            f" {self._settings.min_free_bytes:,}); free some space, and work goes on by itself"
        )

    def require_room(self) -> None:
        """Raises: ReadOnly: while nothing new is taken."""
        if self.level is not Level.OK:
            raise ReadOnly(
                f"the daemon is {self.trouble}; nothing that was acknowledged is lost",
                retry_after_s=RETRY_AFTER_S,
                free_bytes=self.free_bytes,
                level=self.level.value,
            )

    def refused(self) -> None:
        """A write was refused for want of space: make room for the next try at once."""
        self._refused = True
        self._become(Level.FULL)

    def look(self) -> None:
        """Measure, and do what follows. Never raises: a disk that cannot be asked is full until it can."""
        refused, self._refused = self._refused, False
        try:
            self.free_bytes = self._filesystem.free_bytes(self._directory)
            held = self._reserve.held
        except OSError as error:
            self.free_bytes = None
            log.warning("the disk does not say how much room it has", directory=str(self._directory), error=str(error))
            self._become(Level.FULL)
            return
        level = next_level(self.level, self.free_bytes, refused=refused, reserve_held=held, settings=self._settings)
        if level is Level.OK and not held:
            level = self._retake(level)
        self._become(level)

    def _retake(self, level: Level) -> Level:
        """The reserve again: the proof that there is room, also where a quota and not the disk is the limit."""
        try:
            self._reserve.take()
        except OSError as error:
            log.warning("there is no room for the reserve", bytes=self._settings.reserve_bytes, error=str(error))
            return Level.FULL
        return level

    def _become(self, level: Level) -> None:
        if level is Level.FULL:
            try:
                self._reserve.give_up()
            except OSError as error:
                log.warning("the reserve cannot be given up", error=str(error))
        if level is self.level:
            return
        self.level = level
        if level is Level.OK:
            log.info("there is room again", free_bytes=self.free_bytes)
        else:
            log.warning("nothing new is taken", reason=self.trouble)
