"""Backups are whole or none, restoring deletes nothing, and a check tells what is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import sqlite3
import stat
import tracemalloc
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from daemon_jobs import QUICK, job

from esperd.cli.client import esper
from esperd.cli.daemon import esperd as command
from esperd.cli.exit_codes import run
from esperd.daemon.backup import MANIFEST, back_up, read_manifest
from esperd.daemon.job_store import JobStore
from esperd.daemon.lock import prepare_state_directory, state_locked
from esperd.daemon.restore import restore
from esperd.daemon.state import DATABASES, RESTORING, open_databases
from esperd.daemon.state_check import check_state
from esperd.errors import Conflict, NothingToShow, StateDirectoryLocked, StoreFailed
from esperd.messages.jobs import Artifact, Job
from esperd.store import filesystem, inspection
from esperd.store.blobs import Blobs
from esperd.store.filesystem import RealFilesystem

JOB = msgspec.convert(job(1), Job)


def silent(_what, _done, _total):
    """Nobody looks at the progress."""


class FailingFilesystem(RealFilesystem):
    """The real one, until the n-th call that changes something."""

    def __init__(self, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at


def _failing(name):
    def call(self, *arguments):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(5, os.strerror(5), name)
        return getattr(RealFilesystem, name)(self, *arguments)

    return call


for _name in ("create", "write", "fsync", "rename", "fsync_directory", "make_directory", "unlink"):
    setattr(FailingFilesystem, _name, _failing(_name))


async def fill(state: Path) -> tuple[str, str]:
    """A job that succeeded and one that runs, as a killed daemon leaves them; returns the hashes of artifact and checkpoint."""
    prepare_state_directory(state)
    async with AsyncExitStack() as stack:
        databases = await open_databases(stack, state)
        store = JobStore(databases["jobs"], lambda: 1000.0, QUICK.jobs, random.Random(0))
        model = Blobs(state / "blobs").put(b"model")
        first = (await store.submit(JOB, "one")).info.id
        await store.lease(0.0)
        await store.started(first, 1)
        await store.succeeded(first, 1, 1, [Artifact(name="model.safetensors", sha256=model, size_bytes=5)])
        second = (await store.submit(JOB, "two")).info.id
        await store.lease(0.0)
        await store.started(second, 1)
        checkpoint = Blobs(state / "checkpoints" / second).put(b"checkpoint")
        await store.checkpoint(second, 1, checkpoint, 3)
    (state / "seal.key").write_bytes(b"k" * 32)
    return model, checkpoint


async def jobs_in(state: Path):
    async with AsyncExitStack() as stack:
        databases = await open_databases(stack, state)
        return await JobStore(databases["jobs"], lambda: 1000.0).list()


def entries(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.asyncio
async def test_what_is_restored_is_what_was_backed_up_and_the_former_state_is_kept_aside(tmp_path):
    state, backup = tmp_path / "state", tmp_path / "backup"
    model, checkpoint = await fill(state)
    before = await jobs_in(state)
    manifest = back_up(state, backup, silent)
    assert (manifest.missing, {name: version >= 1 for name, version in manifest.versions.items()}) == (
        (),
        {database.name: True for database in DATABASES},
    )
    assert (backup / "blobs/objects" / model[:2] / model).stat().st_nlink == 2  # no second copy on one file system
    with pytest.raises(Conflict, match="is there already"):
        back_up(state, backup, silent)
    with pytest.raises(Conflict, match=r"holds state already .*--force moves it aside"):
        restore(backup, state, silent)
    with state_locked(state), pytest.raises(StateDirectoryLocked):
        restore(backup, state, silent, force=True)
    (state / "jobs.db").write_bytes(b"no database")
    with pytest.raises(StoreFailed, match=r"jobs.db is damaged: .*esperd db restore BACKUP --force"):
        await jobs_in(state)
    _, aside = restore(backup, state, silent, force=True)
    assert await jobs_in(state) == before
    assert (aside / "jobs.db").read_bytes() == b"no database"
    assert check_state(state, silent).well
    restore(backup, tmp_path / "elsewhere", silent)
    assert Blobs(tmp_path / "elsewhere/checkpoints" / before[0].id).get(checkpoint) == b"checkpoint"


@pytest.mark.asyncio
async def test_whichever_call_fails_a_backup_is_none_and_a_restore_is_refused_by_the_daemon_or_done_again(tmp_path):
    state = tmp_path / "state"
    await fill(state)
    counted = FailingFilesystem()
    backup = tmp_path / "backup"
    back_up(state, backup, silent, copy=True, filesystem=counted)
    for number in range(1, counted.calls):  # the last one syncs the name of a manifest that is there
        with pytest.raises(StoreFailed, match="could not be written"):
            back_up(state, tmp_path / f"b{number}", silent, copy=True, filesystem=FailingFilesystem(number))
        with pytest.raises(StoreFailed, match="is no backup: it has no manifest"):
            read_manifest(tmp_path / f"b{number}")
    counted = FailingFilesystem()
    target = tmp_path / "target"
    await fill(target)
    before = await jobs_in(target)
    restore(backup, target, silent, force=True, filesystem=counted)
    assert counted.calls > 20
    for number in range(1, counted.calls + 1):
        with pytest.raises(StoreFailed, match="was cut short"):
            restore(backup, target, silent, force=True, filesystem=FailingFilesystem(number))
        if (target / RESTORING).exists():
            with pytest.raises(StoreFailed, match="was cut short; run"):
                await jobs_in(target)
            (target / RESTORING).unlink()  # so that the next try fails at the next call of a whole restore
        else:
            assert [info.id for info in await jobs_in(target)] == [info.id for info in before], number
    restore(backup, target, silent, force=True)
    assert await jobs_in(target) == before


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("damage", "told"),
    [("bytes", "is damaged"), ("absent", "lacks blobs"), ("outside", "lies outside"), ("newer", "newer than this esperd")],
)
async def test_a_backup_that_is_not_what_it_says_is_refused_before_anything_is_touched(tmp_path, damage, told):
    state, backup = tmp_path / "state", tmp_path / "backup"
    await fill(state)
    manifest = back_up(state, backup, silent, copy=True)
    path = backup / next(file.path for file in manifest.files if file.path.startswith("blobs"))
    match damage:
        case "bytes":
            path.write_bytes(b"other")
        case "absent":
            path.unlink()
        case "outside":
            (tmp_path / "seal.key").write_bytes((backup / "seal.key").read_bytes())  # there, and of the right bytes
            (backup / MANIFEST).write_text((backup / MANIFEST).read_text().replace("seal.key", "../seal.key"))
        case "newer":
            (backup / MANIFEST).write_text((backup / MANIFEST).read_text().replace('"jobs": ', '"jobs": 9'))
    before = entries(state)
    with pytest.raises(StoreFailed, match=told):
        restore(backup, state, silent, force=True)
    assert entries(state) == before


@pytest.mark.asyncio
async def test_a_check_names_every_fault_and_a_damaged_cache_of_kernels_is_moved_aside_at_the_next_start(tmp_path, capsys):
    state = tmp_path / "state"
    model, checkpoint = await fill(state)
    Blobs(state / "blobs").put(b"of nobody")
    assert run(command, ["db", "check", "--state-dir", str(state)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    Blobs(state / "blobs").path(model).write_bytes(b"modal")
    Blobs(state / "checkpoints" / (await jobs_in(state))[0].id).path(checkpoint).unlink()
    (state / "kernels.db").write_bytes(b"no database at all")
    assert run(command, ["db", "check", "--state-dir", str(state), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
    assert found["damaged"] == [f"blobs/objects/{model[:2]}/{model}"]
    assert [row.rpartition(" ")[2] for row in found["dangling"]] == [checkpoint]
    assert found["orphans"] == 1
    assert {database["name"]: bool(database["faults"]) for database in found["databases"]}["kernels"]
    assert run(command, ["db", "backup", str(tmp_path / "b"), "--state-dir", str(state)]) == 1  # and says why
    assert "kernels.db" in capsys.readouterr().err
    await jobs_in(state)
    found = check_state(state, silent)
    assert found.quarantined
    assert all(name.startswith("quarantine/kernels.db.") for name in found.quarantined)
    assert not any(database.faults for database in found.databases)


@pytest.mark.asyncio
async def test_a_check_beside_a_daemon_names_what_cannot_be_read_and_is_not_troubled_by_what_is_replaced_meanwhile(
    tmp_path, monkeypatch, capsys
):
    state = tmp_path / "state"
    model, checkpoint = await fill(state)
    job_id = (await jobs_in(state))[0].id
    replaced = Blobs(state / "checkpoints" / job_id)
    old = replaced.put(b"older checkpoint")
    (done := Blobs(state / "checkpoints" / "j-done")).put(b"of a job that succeeds meanwhile")
    pieces, hashed = RealFilesystem.pieces, []

    def replace_meanwhile(disk, path):
        hashed.append(path.name)
        if path.name == model:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        for piece in pieces(disk, path):
            replaced.sweep({checkpoint})
            done.remove()
            yield piece

    monkeypatch.setattr(RealFilesystem, "pieces", replace_meanwhile)
    monkeypatch.setattr(filesystem, "PIECE_BYTES", 4)
    assert run(command, ["db", "check", "--state-dir", str(state), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
    assert {model, checkpoint, old} <= set(hashed)
    assert (found["damaged"], found["dangling"]) == ([], [])
    assert [said.partition(" at ")[0] for said in found["unreadable"]] == [f"cannot read blob {model}"]


@pytest.mark.asyncio
@pytest.mark.parametrize("copy", [True, False])
async def test_a_backup_takes_what_can_be_read_and_names_what_cannot(tmp_path, copy):
    state = tmp_path / "state"
    model, checkpoint = await fill(state)
    lost = Blobs(state / "blobs").put(b"on a bad sector")

    class BadSector(RealFilesystem):
        def pieces(self, path):
            yield from super().pieces(path)
            if path.name == lost and (not copy or path.is_relative_to(state)):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    manifest = back_up(state, tmp_path / "backup", silent, copy=copy, filesystem=BadSector())
    assert manifest.missing == (f"blobs/objects/{lost[:2]}/{lost}",)
    taken = {path.rpartition("/")[2] for path in entries(tmp_path / "backup")}
    assert ({model, checkpoint} <= taken, lost in taken) == (True, False)
    restore(tmp_path / "backup", tmp_path / "elsewhere", silent)


@pytest.mark.asyncio
@pytest.mark.parametrize("unlisted", ["a shard", "checkpoints", "checkpoints of a job"])
async def test_a_backup_and_a_check_take_what_can_be_listed_and_name_what_cannot(tmp_path, monkeypatch, unlisted):
    state = tmp_path / "state"
    model, checkpoint = await fill(state)
    other = Blobs(state / "blobs").put(b"listed")
    job_id = (await jobs_in(state))[0].id
    shard, kept = f"blobs/objects/{model[:2]}", f"checkpoints/{job_id}/objects"
    bad, lost = {
        "a shard": (shard, f"{shard}/{model}"),
        "checkpoints": ("checkpoints", f"{kept}/{checkpoint[:2]}/{checkpoint}"),
        "checkpoints of a job": (kept, f"{kept}/{checkpoint[:2]}/{checkpoint}"),
    }[unlisted]

    class BadDirectory(RealFilesystem):
        def names(self, path):
            if path == state / bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().names(path)

    manifest = back_up(state, tmp_path / "backup", silent, filesystem=BadDirectory())
    assert manifest.missing == (bad, lost)
    taken = {path.rpartition("/")[2] for path in entries(tmp_path / "backup")}
    assert taken & {model, checkpoint, other} == {model, checkpoint, other} - {lost.rpartition("/")[2]}
    restore(tmp_path / "backup", tmp_path / "elsewhere", silent)
    monkeypatch.setattr("esperd.daemon.state_check.RealFilesystem", BadDirectory)
    monkeypatch.setattr("esperd.store.blobs.RealFilesystem", BadDirectory)
    found = check_state(state, silent)
    assert (found.blobs, len(found.unreadable), found.well) == (2, 1, False)
    assert f"{state / bad}: Input/output error" in found.unreadable[0]


@pytest.mark.asyncio
async def test_a_backup_and_its_restore_take_little_memory_however_large_a_file_is(tmp_path):
    state, size = tmp_path / "state", 32 * 1024 * 1024
    await fill(state)
    with contextlib.closing(sqlite3.connect(state / "events.db")) as events:
        events.execute("CREATE TABLE large AS SELECT zeroblob(?) AS event", (size,))
        events.commit()
    large = Blobs(state / "blobs").put(bytes(size))
    tracemalloc.start()
    try:
        back_up(state, tmp_path / "backup", silent, copy=True)
        restore(tmp_path / "backup", tmp_path / "elsewhere", silent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 2
    assert Blobs(tmp_path / "elsewhere/blobs").verified(large)
    assert (tmp_path / "elsewhere/events.db").stat().st_size > size


@pytest.mark.asyncio
async def test_commands_back_up_and_restore_and_refuse_what_is_no_state(tmp_path, capsys):
    state = tmp_path / "state"
    await fill(state)
    where = ["--state-dir", str(state), "--json"]
    assert run(command, ["db", "backup", str(tmp_path / "b"), *where, "--copy"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["missing"] == []
    assert run(command, ["db", "restore", str(tmp_path / "b"), *where]) == 5
    assert run(command, ["db", "restore", str(tmp_path / "b"), *where, "--force"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["replaced"].startswith(f"{state}/replaced-")
    with pytest.raises(NothingToShow, match="holds no state of esperd"):
        check_state(tmp_path, silent)


@pytest.mark.asyncio
async def test_keys_are_in_a_backup_when_asked_for_and_come_back_for_their_owner_alone(tmp_path, capsys):
    state, plain, full = tmp_path / "state", tmp_path / "plain", tmp_path / "full"
    await fill(state)
    where = ["--state-dir", str(state)]
    assert run(esper, ["keys", "create", "--server", *where]) == 0
    assert run(esper, ["keys", "allow", "me", "ab" * 32, *where]) == 0
    (state / "keys" / "allowed" / ".half-written").write_bytes(b"")
    keys = {path: (state / path).read_bytes() for path in entries(state) if path.startswith("keys/") and "/." not in path}
    assert len(keys) == 2
    capsys.readouterr()

    assert run(command, ["db", "backup", str(plain), *where]) == 0
    assert "keys of the network are not in it; --with-keys takes them" in capsys.readouterr().out
    assert (read_manifest(plain).keys, [path for path in entries(plain) if path.startswith("keys")]) == (None, [])
    assert run(command, ["db", "backup", str(full), "--with-keys", *where]) == 0
    assert "2 of them are keys of the network: keep the backup as secret" in capsys.readouterr().out
    assert set(read_manifest(full).keys) == set(keys)
    assert all((full / path).stat().st_nlink == 1 for path in keys)

    (state / "keys" / "server.key").write_bytes(b"another")
    _, aside = restore(full, state, silent, force=True)
    assert (aside / "keys" / "server.key").read_bytes() == b"another"
    restore(plain, state, silent, force=True)  # without keys in it, those that are there stay
    restore(full, tmp_path / "elsewhere", silent)
    for place in (full, state, tmp_path / "elsewhere"):
        assert {path: (place / path).read_bytes() for path in entries(place) if path.startswith("keys/")} == keys
        for path in keys:
            assert stat.S_IMODE((place / path).stat().st_mode) == 0o600
            assert stat.S_IMODE((place / path).parent.stat().st_mode) == 0o700
    with pytest.raises(Conflict, match="keys"):
        restore(full, state, silent)

    manifest = json.loads((plain / MANIFEST).read_text())
    del manifest["keys"]
    (plain / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    assert read_manifest(plain).keys is None, "a backup of an earlier esperd"
    (plain / MANIFEST).write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(StoreFailed, match="has format 3; this esperd reads 1, 2"):
        read_manifest(plain)


def test_a_copy_of_a_database_does_not_start_over_because_somebody_writes(tmp_path):
    source = tmp_path / "a.db"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE notes (text TEXT)")
        writer.executemany("INSERT INTO notes VALUES (?)", [("x" * 4_000,)] * 2_000)
        done = []

        def progress(copied, _total):
            done.append(copied)
            writer.execute("INSERT INTO notes VALUES ('meanwhile')")

        inspection.copy_database(source, tmp_path / "b.db", progress)
    assert done == sorted(done)
    assert len(done) > 1
