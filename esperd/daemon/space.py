"""Room on the disk: when there is too little, the daemon admits and trains nothing more, keeps what it has, and waits.

Two thresholds, because they ask for different things. *Low*: there is still room for what runs now to end well, so workers
checkpoint. *Full*: a write was refused, so the reserve is given up and only ends are recorded. A disk that *fails* is neither:
no room that is freed mends it.
"""

from __future__ import annotations

import contextlib
import enum
import math
from pathlib import Path

import structlog

from esperd.config import Storage
from esperd.errors import ReadOnly
from esperd.store.filesystem import Filesystem, RealFilesystem
from esperd.store.refusal import Refusal, refusal_of
from esperd.store.reserve import Reserve

RESERVE_FILE = "reserve"
PROBE_FILE = "probe"
"""Written and deleted to find out whether a disk that failed takes what is written."""
PROBE_BYTES = 4096
"""A block of a common file system."""
PROBE_MODE = 0o600
RETRY_AFTER_S = 10.0
"""When a refused submission may try again; chosen, not measured."""
RETURN_SHARE = 1.1
"""Free bytes over the threshold from which work goes on, so that a job's own checkpoints do not turn it off and on; chosen, not
measured."""

log = structlog.get_logger()


class Level(enum.StrEnum):
    """How the disk stands."""

    OK = "ok"
    LOW = "low"
    """Less than ``storage.min_free_bytes``."""
    FULL = "full"
    """A write was refused for want of room, or less than the reserve is left."""
    FAILING = "failing"
    """A write was refused for another reason: an error of the device, a file system that was mounted read-only."""


def next_level(before: Level, free_bytes: int, *, refusal: Refusal | None, reserve_held: bool, settings: Storage) -> Level:
    """Where the disk stands, as a pure function.

    Args:
        before: where it stood.
        free_bytes: what may still be written.
        refusal: what a refused write said since the last look; None: none was refused. One that is still unclear means want of
            room where there is little, and a failing disk elsewhere.
        reserve_held: whether the reserve is taken; what a missing one will need again is no free space.
        settings: thresholds.
    """
    usable = free_bytes if reserve_held else free_bytes - settings.reserve_bytes
    if refusal is Refusal.UNCLEAR:
        refusal = Refusal.NO_ROOM if usable < settings.min_free_bytes else Refusal.FAILING
    if refusal is Refusal.FAILING:
        return Level.FAILING
    if refusal is Refusal.NO_ROOM or free_bytes < settings.reserve_bytes:
        return Level.FULL
    enough = settings.min_free_bytes if before is Level.OK else settings.min_free_bytes * RETURN_SHARE
    if usable >= enough:
        return Level.OK
    return Level.FULL if before is Level.FULL else Level.LOW


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
        self._held = False
        """Whether the reserve was taken, at the last look."""
        self._refusal: Refusal | None = None
        self._said = ""
        """What was refused last, by a disk that fails."""
        self.level = Level.OK
        self.free_bytes: int | None = None
        """At the last look; None before the first, and when it could not be read."""

    @property
    def trouble(self) -> str:
        """Why nothing new is taken; empty when it is."""
        if self.level is Level.OK:
            return ""
        if self.level is Level.FAILING:
            return (
                f"read-only: the disk of {self._directory} is failing ({self._said}); look at the kernel's log and mend or"
                " replace the disk; when it takes what is written, work goes on by itself"
            )
        found = "unknown" if self.free_bytes is None else f"{self.free_bytes:,} bytes"
        return (
            f"read-only: the disk of {self._directory} is {self.level} (free: {found}, storage.min_free_bytes ="
            f" {self._settings.min_free_bytes:,}); free some space: work goes on by itself at {self._goes_on_at:,} bytes"
        )

    @property
    def _goes_on_at(self) -> int:
        """Free bytes from which the disk is well again; a reserve that was given up is taken out of them."""
        reserve = 0 if self._held else self._settings.reserve_bytes
        return math.ceil(self._settings.min_free_bytes * RETURN_SHARE) + reserve

    def require_room(self) -> None:
        """Raises: ReadOnly: while nothing new is taken."""
        if self.level is not Level.OK:
            raise ReadOnly(
                f"the daemon is {self.trouble}; nothing that was acknowledged is lost",
                retry_after_s=RETRY_AFTER_S,
                free_bytes=self.free_bytes,
                level=self.level.value,
            )

    def refused(self, refusal: Refusal, said: str) -> None:
        """A write was refused. For want of room: make some for the next try at once.

        Args:
            refusal: why. Where that is unclear the disk counts as failing until the next look has tried a write of its own.
            said: by whoever wrote, for people.
        """
        self._refusal = refusal
        self._said = said
        self._become(Level.FULL if refusal is Refusal.NO_ROOM else Level.FAILING)

    def look(self) -> None:
        """Measure, and do what follows. Never raises: a disk that cannot be asked is failing until it can."""
        refusal, self._refusal = self._refusal, None
        try:
            self.free_bytes = self._filesystem.free_bytes(self._directory)
            held = self._held = self._reserve.held
            if self.level is Level.FAILING:
                self._probe()
        except OSError as error:
            self._become(self._level_of(error, "the disk does not take or tell what it is asked to"))
            return
        level = next_level(self.level, self.free_bytes, refusal=refusal, reserve_held=held, settings=self._settings)
        if level is Level.OK and not held:
            level = self._retake(level)
        self._become(level)

    def _probe(self) -> None:
        """Write and delete a file, as a blob or a database would be.

        Raises:
            OSError: when the disk refuses.
        """
        path = self._directory / PROBE_FILE
        if self._filesystem.exists(path):  # a probe that failed half-way
            self._filesystem.unlink(path)
        descriptor = self._filesystem.create(path, PROBE_MODE)
        try:
            self._filesystem.write(descriptor, bytes(PROBE_BYTES))
            self._filesystem.fsync(descriptor)
        finally:
            self._filesystem.close(descriptor)
            with contextlib.suppress(OSError):  # the first error says what is wrong; the next probe begins with this
                self._filesystem.unlink(path)

    def _level_of(self, error: OSError, what: str) -> Level:
        log.warning(what, directory=str(self._directory), error=str(error))
        if refusal_of(error) is Refusal.NO_ROOM:
            return Level.FULL
        self._said = str(error)
        return Level.FAILING

    def _retake(self, level: Level) -> Level:
        """The reserve again: the proof that there is room, also where a quota and not the disk is the limit."""
        try:
            self._reserve.take()
        except OSError as error:
            return self._level_of(error, "the disk does not take the reserve")
        self._held = True
        return level

    def _become(self, level: Level) -> None:
        if level is Level.FULL:
            try:
                self._reserve.give_up()
                self._held = False
            except OSError as error:
                log.warning("the reserve cannot be given up", error=str(error))
        if level is self.level:
            return
        before, self.level = self.level, level
        if level is not Level.OK:
            log.warning("nothing new is taken", reason=self.trouble)
        elif before is Level.FAILING:
            log.info("the disk takes what is written again", free_bytes=self.free_bytes)
        else:
            log.info("there is room again", free_bytes=self.free_bytes)
