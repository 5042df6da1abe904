from __future__ import annotations

import errno
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.cache.seal import KEY_BYTES, Seal
from esperd.errors import StoreFailed
from esperd.store.filesystem import RealFilesystem


def test_the_key_is_made_once_for_its_owner_only_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "seal.key"
    seal = Seal.open(path).sign(b"manifest")
    assert Seal.open(path).is_intact(b"manifest", seal)
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o600, KEY_BYTES)
    assert list(tmp_path.iterdir()) == [path]


@given(manifest=st.binary(), other=st.binary())
def test_a_seal_fits_the_bytes_it_was_made_for_and_no_others(manifest, other):
    seal = Seal(b"k" * KEY_BYTES)
    assert seal.is_intact(manifest, seal.sign(manifest))
    assert seal.is_intact(other, seal.sign(manifest)) == (other == manifest)
    assert not seal.is_intact(manifest, other)
    assert not Seal(b"o" * KEY_BYTES).is_intact(manifest, seal.sign(manifest))


def test_two_who_make_the_key_at_once_agree_on_one(tmp_path):
    both_saw_none = threading.Barrier(2)

    class MeetingFilesystem(RealFilesystem):
        def exists(self, path):
            found = super().exists(path)
            both_saw_none.wait(10)
            return found

    seals = []
    threads = [
        threading.Thread(target=lambda: seals.append(Seal.open(tmp_path / "seal.key", MeetingFilesystem()).sign(b"m")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seals) == 2
    assert seals[0] == seals[1]


def test_a_key_that_others_may_use_is_refused(tmp_path):
    path = tmp_path / "seal.key"
    Seal.open(path)
    path.chmod(0o640)
    with pytest.raises(StoreFailed, match="has mode 0640: others may use it; remove it"):
        Seal.open(path)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    path = tmp_path / "seal.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(StoreFailed, match="has 5 bytes instead of 32"):
        Seal.open(path)


def test_a_disk_that_fails_leaves_no_half_a_key(tmp_path):
    class FullFilesystem(RealFilesystem):
        def fsync(self, descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreFailed, match="No space left on device"):
        Seal.open(tmp_path / "seal.key", FullFilesystem())
    assert list(tmp_path.iterdir()) == []
