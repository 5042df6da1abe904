"""Memory that a daemon shares with one process: what is very large is written there instead of being sent through a socket.

Two segments for each incarnation of a process actor, one a direction, made by the daemon and inherited by the process it
starts. They are anonymous files (``memfd_create``): there is no name that a message could abuse, nothing that anybody else
could open, and nothing to clean up after a crash; the kernel frees one with the last process that holds it. Sealed, so that
neither side can cut it short under the other's feet. The size is fixed, and what does not fit travels as a frame. Memory is used
only while bytes are on their way. They are written and read by ``pwrite`` and ``pread``: a mapping costs more where every page
is touched for the first time (measured).

A message names a :class:`Place` instead of the bytes. The receiver copies them out at once, frees the memory, and then the
place. The numbers at the head of a segment, one for each slot, say what lies there now: a place that was read already, or
written over, is refused, so that a frame that comes twice is malformed and never somebody else's bytes.

Layout: ``SLOTS`` unsigned 64-bit numbers (0: free), the rest of a page, then bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Annotated

import anyio.to_thread
import msgspec
import structlog

from esperd.actors.codec import ENVELOPE, OUT_OF_BAND_BYTES, UNDECODABLE
from esperd.errors import MalformedMessage

SHARED_BYTES = 64 * 1024 * 1024
"""From here on bytes are shared. Below, a frame is faster: new memory costs more than what ZeroMQ copies beside the event loop
(measured with ``bench/frames.py``)."""
SEGMENT_BYTES = 256 * 1024 * 1024
"""Of one direction: as much as the largest message."""
SLOTS = 64
"""Buffers on their way at the same time; chosen, not measured."""
HEADER_BYTES = mmap.PAGESIZE

log = structlog.get_logger(__name__)


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where bytes lie in the sender's segment; a frame holds it, as msgpack."""

    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    offset: Annotated[int, msgspec.Meta(ge=HEADER_BYTES, lt=SEGMENT_BYTES)]
    size_bytes: Annotated[int, msgspec.Meta(ge=OUT_OF_BAND_BYTES, le=SEGMENT_BYTES)]
    sequence: Annotated[int, msgspec.Meta(gt=0, le=2**63 - 1)]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Place).decode


def make_segment(name: str) -> int:
    """A descriptor of a new, empty segment, sealed at its size.

    Raises:
        OSError: when this system has no sealed memory files, or no descriptor is left.
    """
    descriptor = os.memfd_create(f"esperd {name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, SEGMENT_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Segment:
    """One direction, as either side sees it.

    Args:
        descriptor: of :func:`make_segment`; closed by :meth:`close`.

    Raises:
        OSError: when it is none: memory that others can cut short would kill who looks at its numbers.
    """

    def __init__(self, descriptor: int) -> None:
        held = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if held & _seals() != _seals() or os.fstat(descriptor).st_size != SEGMENT_BYTES:
            raise OSError(f"descriptor {descriptor} is no segment of esperd")
        self._memory = mmap.mmap(descriptor, SEGMENT_BYTES)
        self.descriptor = descriptor
        self.numbers = memoryview(self._memory)[: 8 * SLOTS].cast("Q")
        """What lies where, by slot; 0: nothing."""
        self.closed = False
        self._use = threading.Lock()

    def write(self, data: bytes, offset: int) -> None:
        """Write bytes, from any thread; nothing once it is closed."""
        view, written = memoryview(data), 0
        with self._use:
            while not self.closed and written < len(data):
                written += os.pwrite(self.descriptor, view[written:], offset + written)

    def read(self, size_bytes: int, offset: int) -> bytes:
        """A copy of bytes."""
        return os.pread(self.descriptor, size_bytes, offset)

    def give_back(self, place: Place) -> None:
        """Free the memory of a place; what is read there from now on is zeros. Where the kernel will not, it stays taken until
        the segment goes.
        """
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_REMOVE, place.offset, _whole_pages(place.size_bytes))

    def close(self) -> None:
        """Let go of it, after whoever writes. Safe to call twice."""
        with self._use:
            if self.closed:
                return
            self.closed = True
            self.numbers.release()
            self._memory.close()
            os.close(self.descriptor)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Outgoing:
    """The sender's end of a segment.

    Args:
        segment: closed by whoever opened it.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._held: dict[int, Place] = {}
        self._sequence = 0

    def reserve(self, size_bytes: int) -> Place | None:
        """A place where nothing lies; None when there is no room. Nobody reads there before it is told."""
        if self._segment.closed:
            return None
        numbers = self._segment.numbers
        self._held = {slot: place for slot, place in self._held.items() if numbers[slot] == place.sequence}
        free = next((slot for slot in range(SLOTS) if slot not in self._held), None)
        offset = self._gap(size_bytes)
        if free is None or offset is None:
            return None
        self._sequence += 1
        place = Place(free, offset, size_bytes, self._sequence)
        numbers[free] = place.sequence
        self._held[free] = place
        return place

    def withdraw(self, place: Place) -> None:
        """Nobody was told of a place: it is free."""
        if not self._segment.closed and self._held.get(place.slot) == place:
            self._segment.give_back(place)
            self._segment.numbers[place.slot] = 0

    def _gap(self, size_bytes: int) -> int | None:
        """The first one that is large enough."""
        offset = HEADER_BYTES
        for place in sorted(self._held.values(), key=lambda place: place.offset):
            if place.offset - offset >= size_bytes:
                return offset
            offset = place.offset + _whole_pages(place.size_bytes)
        return offset if SEGMENT_BYTES - offset >= size_bytes else None


class Incoming:
    """The receiver's end of a segment.

    Args:
        segment: closed by whoever opened it.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def take(self, place: Place) -> bytes:
        """Copy bytes out and free their place.

        Raises:
            MalformedMessage: when nothing of that number lies there, or it is not inside the segment.
        """
        numbers, end = self._segment.numbers, place.offset + place.size_bytes
        if place.offset % mmap.PAGESIZE or end > SEGMENT_BYTES:
            raise self._refusal(place)
        data = self._segment.read(place.size_bytes, place.offset)
        if numbers[place.slot] != place.sequence or len(data) != place.size_bytes:  # looked at last: it was there all the time
            raise self._refusal(place)
        self._segment.give_back(place)
        numbers[place.slot] = 0
        return data

    def _refusal(self, place: Place) -> MalformedMessage:
        return MalformedMessage(
            f"a message names {place.size_bytes} shared bytes at {place.offset}, number {place.sequence}, which are not there",
            offset=place.offset,
            size_bytes=place.size_bytes,
        )


def is_worth_sharing(frames: Sequence[bytes]) -> bool:
    """Whether a message has a buffer that is faster written than sent."""
    return any(len(frame) >= SHARED_BYTES for frame in frames[ENVELOPE:])


class Shared:
    """One side's view of both segments: it writes into one and reads from the other.

    Args:
        outgoing: descriptor of the segment this side writes; closed by :meth:`close`.
        incoming: descriptor of the one it reads; likewise.

    Raises:
        OSError: when one of them is no segment, or cannot be mapped; the descriptors are left as they are.
    """

    def __init__(self, outgoing: int, incoming: int) -> None:
        self._segments = [Segment(outgoing), Segment(incoming)]
        self._outgoing, self._incoming = Outgoing(self._segments[0]), Incoming(self._segments[1])
        self.placed = 0
        """Buffers that were written instead of sent."""
        self.taken = 0
        """Buffers that were read instead of received."""

    async def place(self, frames: Sequence[bytes]) -> tuple[list[bytes], list[Place]]:
        """A message's frames with the large ones written and their places instead, and those places.

        Written in a thread: the event loop goes on. Whoever is cancelled meanwhile has placed nothing.
        """
        sent, places = list(frames), []
        try:
            for number in range(ENVELOPE, len(sent)):
                place = self._outgoing.reserve(len(sent[number])) if len(sent[number]) >= SHARED_BYTES else None
                if place is not None:
                    places.append(place)
                    try:
                        await anyio.to_thread.run_sync(self._segments[0].write, sent[number], place.offset)
                    except OSError as error:  # no memory: it travels as a frame, as what finds no room does
                        self.withdraw([places.pop()])
                        log.warning("bytes are sent and not shared", size_bytes=len(sent[number]), reason=str(error))
                        continue
                    sent[number] = _encode(place)
        except BaseException:
            self.withdraw(places)
            raise
        self.placed += len(places)
        return sent, places

    def withdraw(self, places: Sequence[Place]) -> None:
        """A message was not sent after all."""
        for place in places:
            self._outgoing.withdraw(place)

    def fetch(self, frames: Sequence[bytes]) -> list[bytes]:
        """A message's frames with the bytes for their places. A frame of a buffer's size is the buffer itself.

        Raises:
            MalformedMessage: when a frame is neither, or a place does not hold what it should.
        """
        received = list(frames)
        wrong: MalformedMessage | None = None
        for number in range(ENVELOPE, len(received)):
            if len(received[number]) >= OUT_OF_BAND_BYTES:
                continue
            try:
                received[number] = self._incoming.take(_decode(received[number]))
                self.taken += 1
            except UNDECODABLE as error:
                wrong = wrong or MalformedMessage(f"frame {number} is neither a buffer nor the place of one: {error}")
            except MalformedMessage as error:
                wrong = wrong or error
        if wrong is not None:  # only now: the other places are free again
            raise wrong
        return received

    def close(self) -> None:
        """Let go of both. Safe to call twice."""
        for segment in self._segments:
            segment.close()


def make_shared(name: str) -> tuple[Shared, tuple[int, int]] | None:
    """The daemon's view of memory for a process that is to be started, and the descriptors the process must inherit: what it
    reads, and what it writes. None where this system has no such memory: everything is sent, then.
    """
    made: list[int] = []
    try:
        made.append(make_segment(f"to {name}"))
        made.append(make_segment(f"from {name}"))
        return Shared(*made), (made[0], made[1])
    except (OSError, AttributeError) as error:
        for descriptor in made:
            os.close(descriptor)
        log.warning("no memory is shared with a process", actor=name, reason=str(error))
        return None


def inherited(descriptors: tuple[int, int] | None, name: str) -> Shared | None:
    """A process's side of what its daemon made; None when there is none, or it did not get this far."""
    if descriptors is None:
        return None
    from_daemon, to_daemon = descriptors
    try:
        shared = Shared(to_daemon, from_daemon)
    except OSError as error:  # started by a wrapper that closes what it does not know
        log.warning("no memory is shared with the daemon", actor=name, reason=str(error))
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - positional only
    return shared
