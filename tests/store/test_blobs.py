from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import StoreFailed
from esperd.store import filesystem
from esperd.store.blobs import Blobs
from esperd.store.filesystem import RealFilesystem


class FailingFilesystem(RealFilesystem):
    """The real one, until the n-th call that changes or syncs something; counts from 1."""

    def __init__(self, fail_at: int | None = None, code: int = errno.EIO) -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at
        self.code = code

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self.fail_at:
            raise OSError(self.code, os.strerror(self.code), name)

    def create(self, path, mode):
        self._count("create")
        return super().create(path, mode)

    def write(self, descriptor, data):
        self._count("write")
        super().write(descriptor, data)

    def fsync(self, descriptor):
        self._count("fsync")
        super().fsync(descriptor)

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)

    def fsync_directory(self, path):
        self._count("fsync_directory")
        super().fsync_directory(path)

    def make_directory(self, path, mode):
        self._count("make_directory")
        super().make_directory(path, mode)


class BadSector(RealFilesystem):
    """The disk tells nothing of paths that hold ``bad``, and hands out none of their bytes."""

    bad = "nothing"

    def _ask(self, path):
        if self.bad in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def exists(self, path):
        self._ask(path)
        return super().exists(path)

    def changed_ns(self, path):
        self._ask(path)
        return super().changed_ns(path)

    def names(self, path):
        self._ask(path)
        return super().names(path)

    def read(self, path, offset=0, length=None):
        self._ask(path)
        return super().read(path, offset, length)

    def pieces(self, path):
        self._ask(path)
        return super().pieces(path)

    def unlink(self, path):
        self._ask(path)
        super().unlink(path)


def put_calls(tmp_path) -> list[str]:
    filesystem = FailingFilesystem()
    Blobs(tmp_path / "counted", filesystem).put(b"kernel")
    return filesystem.calls


def files_under(directory) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@settings(max_examples=25, deadline=None)
@given(data=st.binary(max_size=10_000))
def test_a_blob_comes_back_as_it_was_under_the_hash_of_its_bytes(tmp_path_factory, data):
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    sha256 = blobs.put(data)
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert blobs.get(sha256) == data
    assert blobs.size(sha256) == len(data)
    assert blobs.contains(sha256)


def test_putting_twice_leaves_one_file(tmp_path):
    blobs = Blobs(tmp_path)
    assert blobs.put(b"kernel") == blobs.put(b"kernel")
    assert len(files_under(tmp_path)) == 1


def test_blobs_are_readable_by_their_owner_only(tmp_path):
    blobs = Blobs(tmp_path / "blobs")
    path = blobs.path(blobs.put(b"kernel"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(level.stat().st_mode) for level in list(path.parents)[:3]} == {0o700}


def test_bytes_are_synced_before_they_get_their_name_and_the_name_is_synced_after(tmp_path):
    calls = put_calls(tmp_path)
    assert calls[-5:] == ["create", "write", "fsync", "rename", "fsync_directory"]


def test_whichever_call_fails_no_wrong_bytes_appear_nothing_is_left_behind_and_a_second_try_succeeds(tmp_path):
    for number, call in enumerate(put_calls(tmp_path), start=1):
        directory = tmp_path / f"failing-{number}"
        with pytest.raises(StoreFailed, match=r"cannot store blob .* \(ENOSPC\)"):
            Blobs(directory, FailingFilesystem(number, errno.ENOSPC)).put(b"kernel")
        sha256 = hashlib.sha256(b"kernel").hexdigest()
        # Only after the rename is there a file at all, and then it is whole.
        assert files_under(directory) in ([], [sha256]), call
        blobs = Blobs(directory)
        assert blobs.put(b"kernel") == sha256
        assert blobs.get(sha256) == b"kernel"


def test_a_blob_found_in_place_is_synced_again_because_its_writer_may_have_died_before(tmp_path):
    Blobs(tmp_path).put(b"kernel")
    filesystem = FailingFilesystem()
    Blobs(tmp_path, filesystem).put(b"kernel")
    assert filesystem.calls.count("fsync_directory") == 4
    assert "create" not in filesystem.calls


def test_a_damaged_blob_is_quarantined_and_refused_and_can_be_put_again(tmp_path):
    blobs = Blobs(tmp_path)
    sha256 = blobs.put(b"kernel")
    blobs.path(sha256).write_bytes(b"kernal")
    with pytest.raises(StoreFailed, match="is damaged: its bytes hash to"):
        blobs.get(sha256)
    assert not blobs.contains(sha256)
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [b"kernal"]
    blobs.put(b"kernel")
    assert blobs.get(sha256) == b"kernel"


def test_putting_over_a_damaged_copy_replaces_it(tmp_path):
    blobs = Blobs(tmp_path)
    sha256 = blobs.put(b"kernel")
    blobs.path(sha256).write_bytes(b"")
    blobs.put(b"kernel")
    assert blobs.get(sha256) == b"kernel"
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_ranges_end_where_the_blob_ends(tmp_path):
    blobs = Blobs(tmp_path)
    sha256 = blobs.put(b"0123456789")
    assert blobs.read_range(sha256, 0, 4) == b"0123"
    assert blobs.read_range(sha256, 8, 4) == b"89"
    assert blobs.read_range(sha256, 10, 4) == b""
    with pytest.raises(StoreFailed, match="offset -1"):
        blobs.read_range(sha256, -1, 4)


@pytest.mark.parametrize("name", ["", "..", "../../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_no_name_leads_out_of_the_directory(tmp_path, name):
    blobs = Blobs(tmp_path)
    for call in (blobs.path, blobs.get, blobs.size, blobs.contains):
        with pytest.raises(StoreFailed, match="64 lower-case hexadecimal digits"):
            call(name)


def test_a_missing_blob_is_named(tmp_path):
    blobs = Blobs(tmp_path)
    missing = "0" * 64
    assert not blobs.contains(missing)
    for call in (blobs.get, blobs.size):
        with pytest.raises(StoreFailed, match=f"blob {missing}.* is not there"):
            call(missing)


def torn_by(blobs, sha256, pid):
    """What is left of a blob whose writer died."""
    path = blobs.path(sha256).with_name(f".{sha256}.{pid}.0123abcd")
    path.write_bytes(b"ker")
    return path


def test_a_sweep_keeps_what_is_named_and_what_is_being_written_or_in_quarantine(tmp_path):
    blobs = Blobs(tmp_path)
    kept, damaged, _ = (blobs.put(data) for data in (b"kept", b"damaged", b"unwanted"))
    blobs.path(damaged).write_bytes(b"")
    with pytest.raises(StoreFailed, match="is damaged"):
        blobs.get(damaged)
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale, fresh, foreign = (torn_by(blobs, kept, pid) for pid in (gone.pid, os.getpid(), 1))
    assert blobs.sweep({kept}) == 2
    assert not stale.exists()
    left = [kept, fresh.name, foreign.name, *(path.name for path in (tmp_path / "quarantine").iterdir())]
    assert files_under(tmp_path) == sorted(left)
    assert blobs.sweep({kept}) == 0
    assert blobs.get(kept) == b"kept"


def test_a_disk_that_does_not_delete_is_named(tmp_path):
    class Stubborn(RealFilesystem):
        def unlink(self, path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    blobs = Blobs(tmp_path, Stubborn())
    blobs.put(b"kernel")
    with pytest.raises(StoreFailed, match=r"cannot delete blob .* \(EIO\)"):
        blobs.sweep(())


def test_a_removed_directory_can_be_written_again(tmp_path):
    blobs = Blobs(tmp_path / "blobs")
    blobs.remove()
    blobs.put(b"kernel")
    blobs.remove()
    assert list(tmp_path.iterdir()) == []
    assert blobs.get(blobs.put(b"kernel")) == b"kernel"


def test_what_the_disk_does_not_tell_is_a_typed_error_of_that_blob_and_holds_up_no_other(tmp_path):
    disk = BadSector()
    blobs = Blobs(tmp_path, disk)
    blobs.put(b"one"), blobs.put(b"another")
    bad, good = blobs.names()  # what is in the way of others comes first
    seen, disk.bad = blobs.changes(), bad
    for call in (blobs.contains, blobs.verified, blobs.is_good, blobs.get, lambda name: blobs.discard({name: seen[name]})):
        with pytest.raises(StoreFailed, match="EIO"):
            call(bad)
    assert (blobs.verified(good), set(blobs.changes()), set(blobs.names())) == (True, {good}, {bad, good})
    with pytest.raises(StoreFailed, match=f"cannot delete blob {bad}.*EIO"):
        blobs.sweep(())
    assert blobs.names() == [bad]
    disk.bad = str(tmp_path)
    for call in (blobs.names, blobs.quarantined, blobs.remove):
        with pytest.raises(StoreFailed, match="EIO"):
            call()


def test_a_directory_that_cannot_be_listed_holds_up_no_other_and_is_told(tmp_path):
    disk = BadSector()
    blobs = Blobs(tmp_path, disk)
    first, second, third = (blobs.put(data) for data in (b"one", b"another", b"a third"))
    stale = torn_by(blobs, third, 2**22 + 1)  # above the largest id there is
    seen, disk.bad, told = blobs.changes(), f"objects/{first[:2]}", []
    assert set(blobs.names(told.append)) == set(blobs.changes(told.append)) == {second, third}
    assert {error.fields["path"] for error in told} == {str(tmp_path / disk.bad)}
    for call in (blobs.names, blobs.changes, blobs.remove_temporaries, lambda: blobs.sweep({second})):
        with pytest.raises(StoreFailed, match=f"cannot list directory {first[:2]} .*EIO"):
            call()
    assert (stale.exists(), set(blobs.names(told.append))) == (False, {second})
    with pytest.raises(StoreFailed, match=f"cannot collect blob {first}.*EIO"):
        blobs.discard({sha256: seen[sha256] for sha256 in (first, second)})
    disk.bad = "nothing"
    assert blobs.names() == [first]


def test_putting_over_a_copy_that_cannot_be_read_replaces_it_and_one_that_may_be_good_stays_until_then(tmp_path):
    class Unreadable(FailingFilesystem):
        def read(self, path, offset=0, length=None):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    blobs, disk = Blobs(tmp_path), Unreadable()
    sha256 = blobs.put(b"kernel")
    before = blobs.path(sha256).stat().st_ino
    assert Blobs(tmp_path, disk).put(b"kernel") == sha256
    assert (blobs.get(sha256), blobs.quarantined()) == (b"kernel", ())
    assert blobs.path(sha256).stat().st_ino != before
    for number, call in enumerate(disk.calls, start=1):
        with pytest.raises(StoreFailed, match="EMFILE"):
            Blobs(tmp_path, Unreadable(number, errno.EMFILE)).put(b"kernel")
        assert (files_under(tmp_path), blobs.get(sha256)) == ([sha256], b"kernel"), call


def test_a_blob_that_is_deleted_while_it_is_hashed_is_read_to_its_end_and_one_that_is_gone_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "PIECE_BYTES", 4)

    class Deleting(RealFilesystem):
        def pieces(self, path):
            for piece in super().pieces(path):
                path.unlink(missing_ok=True)
                yield piece

    blobs = Blobs(tmp_path, Deleting())
    sha256 = blobs.put(b"a checkpoint that is replaced")
    assert (blobs.verified(sha256), blobs.verified(sha256)) == (True, None)
