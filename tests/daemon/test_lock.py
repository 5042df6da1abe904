"""The daemon's directories: whose they are, who may write them, and who holds them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from esperd.daemon.lock import locked, prepare_runtime_directory, prepare_state_directory
from esperd.errors import StateDirectoryLocked, StateDirectoryUnusable, StoreFailed

PREPARE = {"daemon.state_directory": prepare_state_directory, "daemon.runtime_directory": prepare_runtime_directory}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")


@pytest.fixture
def directories(tmp_path):
    for name in ("state", "other", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    return tmp_path


def test_one_runtime_directory_has_one_daemon_whatever_its_state_directory(directories):
    with (
        locked(directories / "state", directories / "run"),
        pytest.raises(StateDirectoryLocked, match=f"run belongs to a running daemon, process {os.getpid()};.*runtime_directory"),
        locked(directories / "other", directories / "run"),
    ):
        pass
    with locked(directories / "other", directories / "run"):
        pass


def test_one_directory_may_hold_both_state_and_sockets(directories):
    with locked(directories / "state", directories / "state"):
        pass


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_runtime_directory_that_others_may_write_is_refused_and_left_as_it_is(directories, mode):
    (directories / "run").chmod(mode)
    with pytest.raises(StateDirectoryUnusable, match=f"others may write .*run .mode {mode:04o}.*chmod go-w"):
        prepare_runtime_directory(directories / "run")
    assert (directories / "run").stat().st_mode & 0o7777 == mode


def test_a_runtime_directory_that_others_may_only_read_is_used_as_it_is(directories):
    (directories / "run").chmod(0o755)
    prepare_runtime_directory(directories / "run")
    assert (directories / "run").stat().st_mode & 0o777 == 0o755


@as_root
@pytest.mark.parametrize("option", PREPARE)
def test_a_directory_of_somebody_else_is_refused(directories, option):
    os.chown(directories / "run", 65534, -1)
    with pytest.raises(StateDirectoryUnusable, match=f"belongs to user 65534, and this daemon runs as user 0;.*{option}"):
        PREPARE[option](directories / "run")


@pytest.mark.parametrize("option", PREPARE)
def test_a_directory_that_cannot_be_made_is_refused(directories, option):
    (directories / "file").touch()
    with pytest.raises(StateDirectoryUnusable, match=f"cannot be written: Not a directory; choose another with {option}"):
        PREPARE[option](directories / "file" / "below")


def test_a_lock_file_that_cannot_be_opened_is_named(directories):
    (directories / "state" / "daemon.lock").mkdir()
    with (
        pytest.raises(StateDirectoryUnusable, match=r"daemon\.lock cannot be written: Is a directory"),
        locked(directories / "state", directories / "run"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["touch", "ftruncate"])
def test_a_disk_that_refuses_is_no_wrong_configuration(directories, monkeypatch, code, call):
    def refuse(*_asked, **_named):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path if call == "touch" else os, call, refuse)
    with pytest.raises(StoreFailed, match=f"the disk refuses: {os.strerror(code)}") as refused:  # noqa: SIM117 - one of the two raises
        with locked(directories / "state", directories / "run"):
            prepare_state_directory(directories / "state")
    assert (refused.value.exit_status, refused.value.fields["errno"]) == (1, errno.errorcode[code])
