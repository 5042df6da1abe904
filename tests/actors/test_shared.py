"""Memory of two processes: what is written is read once, what is not there is refused, and it never grows."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from esperd.actors import shared
from esperd.actors.codec import OUT_OF_BAND_BYTES
from esperd.actors.shared import HEADER_BYTES, SEGMENT_BYTES, SLOTS, Place, Shared, inherited, make_shared
from esperd.errors import MalformedMessage

HEAD_AND_BODY = [b"head", b"body"]
BYTES = os.urandom(OUT_OF_BAND_BYTES + 3)


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Shared, Shared]]:
    """The daemon's side and its process's."""
    monkeypatch.setattr(shared, "SHARED_BYTES", OUT_OF_BAND_BYTES)
    made = make_shared("worker")
    assert made is not None
    daemon, (reads, writes) = made
    process = inherited((os.dup(reads), os.dup(writes)), "worker")
    assert process is not None
    yield daemon, process
    daemon.close()
    process.close()
    daemon.close()


@pytest.mark.asyncio
async def test_what_one_side_places_the_other_takes_in_both_directions(sides: tuple[Shared, Shared]) -> None:
    for sender, receiver in (sides, sides[::-1]):
        frames = [*HEAD_AND_BODY, BYTES, b"\x00" * OUT_OF_BAND_BYTES]
        for _ in range(3):
            sent, places = await sender.place(frames)
            assert sum(map(len, sent)) < 100
            assert len(places) == 2
            assert receiver.fetch(sent) == frames


@pytest.mark.asyncio
async def test_a_message_that_was_not_sent_or_is_wrong_in_one_frame_keeps_no_memory(sides: tuple[Shared, Shared]) -> None:
    daemon, process = sides
    segment = daemon._segments[0].descriptor
    _, places = await daemon.place([*HEAD_AND_BODY, BYTES])
    daemon.withdraw(places)
    assert os.fstat(segment).st_blocks * 512 <= HEADER_BYTES
    sent, _ = await daemon.place([*HEAD_AND_BODY, BYTES, BYTES])
    with pytest.raises(MalformedMessage):
        process.fetch([*sent[:2], b"no place", *sent[2:]])
    assert os.fstat(segment).st_blocks * 512 <= HEADER_BYTES


@pytest.mark.asyncio
async def test_where_memory_is_refused_bytes_travel_as_frames(
    sides: tuple[Shared, Shared], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr("esperd.actors.shared.os.pwrite", refused)
    frames = [*HEAD_AND_BODY, BYTES]
    assert await sides[0].place(frames) == (frames, [])


@pytest.mark.parametrize("mapped", [0, 1])
def test_where_memory_cannot_be_mapped_none_is_shared_and_no_descriptor_stays_open(
    monkeypatch: pytest.MonkeyPatch, mapped: int
) -> None:
    maps = [mmap.mmap] * mapped

    def refused(descriptor: int, size_bytes: int) -> mmap.mmap:
        if maps:
            return maps.pop()(descriptor, size_bytes)
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr("esperd.actors.shared.mmap.mmap", refused)
    held = len(list(Path("/proc/self/fd").iterdir()))
    assert make_shared("another") is None
    assert len(list(Path("/proc/self/fd").iterdir())) == held


@pytest.mark.asyncio
async def test_memory_is_used_only_while_bytes_are_on_their_way(sides: tuple[Shared, Shared]) -> None:
    daemon, process = sides
    segment = daemon._segments[0].descriptor

    def used_bytes() -> int:
        return os.fstat(segment).st_blocks * 512

    sent, _ = await daemon.place([*HEAD_AND_BODY, BYTES])
    assert used_bytes() >= len(BYTES)
    process.fetch(sent)
    assert used_bytes() <= HEADER_BYTES


@pytest.mark.asyncio
async def test_what_finds_no_room_travels_as_a_frame_until_there_is_room(sides: tuple[Shared, Shared]) -> None:
    daemon, process = sides
    waiting = [await daemon.place([*HEAD_AND_BODY, BYTES]) for _ in range(SLOTS)]
    assert all(places for _, places in waiting)
    frames = [*HEAD_AND_BODY, BYTES]
    assert await daemon.place(frames) == (frames, [])
    assert process.fetch(frames) == frames
    process.fetch(waiting[7][0])
    daemon.withdraw(waiting[9][1])  # it was not sent after all
    for _ in range(2):
        assert (await daemon.place(frames))[1]
    assert (await daemon.place(frames))[1] == []


@pytest.mark.asyncio
async def test_a_place_that_is_not_there_or_was_read_is_refused(sides: tuple[Shared, Shared]) -> None:
    daemon, process = sides
    sent, (place,) = await daemon.place([*HEAD_AND_BODY, BYTES])
    hostile = [
        msgspec.structs.replace(place, sequence=place.sequence + 1),
        msgspec.structs.replace(place, slot=place.slot + 1),
        msgspec.structs.replace(place, offset=place.offset + 1),
        msgspec.structs.replace(place, offset=SEGMENT_BYTES - HEADER_BYTES),
        msgspec.structs.replace(place, offset=0),
        msgspec.structs.replace(place, offset=-HEADER_BYTES),
        msgspec.structs.replace(place, slot=SLOTS),
        msgspec.structs.replace(place, size_bytes=2**40),
    ]
    refused = [msgspec.msgpack.encode(wrong) for wrong in hostile]
    for frame in [*refused, b"", b"/dev/shm/../../etc/passwd", b"\xc1", msgspec.msgpack.encode(["x"] * 4)]:
        with pytest.raises(MalformedMessage):
            process.fetch([*HEAD_AND_BODY, frame])
    assert process.fetch(sent)[2] == BYTES
    with pytest.raises(MalformedMessage, match="not there"):
        process.fetch(sent)  # the same frame again
    again, _ = await daemon.place([*HEAD_AND_BODY, BYTES[::-1]])
    with pytest.raises(MalformedMessage):
        process.fetch(sent)  # others' bytes lie there now
    assert process.fetch(again)[2] == BYTES[::-1]


def test_memory_that_others_could_cut_short_is_not_shared() -> None:
    unsealed = os.memfd_create("esperd", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SEGMENT_BYTES)
    with Path(os.devnull).open("rb") as other:
        for descriptor in (unsealed, other.fileno(), 10**6):
            assert inherited((descriptor, descriptor), "worker") is None
    os.close(unsealed)


@pytest.mark.asyncio
async def test_nothing_is_placed_once_it_is_closed(sides: tuple[Shared, Shared]) -> None:
    daemon, _ = sides
    _, places = await daemon.place([*HEAD_AND_BODY, BYTES])
    daemon.close()
    daemon.withdraw(places)
    frames = [*HEAD_AND_BODY, BYTES]
    assert await daemon.place(frames) == (frames, [])


def test_a_place_has_no_name() -> None:
    assert Place.__struct_fields__ == ("slot", "offset", "size_bytes", "sequence")
