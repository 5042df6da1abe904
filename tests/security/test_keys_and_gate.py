"""Strangers are refused, told so, and counted; a key that was revoked opens nothing any more."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import NoReturn

import anyio
import pytest

from esperd.actors import keys
from esperd.actors.curve import Gate, ServerSecurity
from esperd.actors.keys import AllowList, ClientSecurity, create_pair, open_pair, public_key, read_pair, security_of
from esperd.actors.publication import LARGEST_TOPIC_BYTES, Publisher, Subscriber
from esperd.actors.requests import RequestClient, RequestServer
from esperd.errors import AuthenticationFailed, ConfigError, Conflict, DaemonUnreachable, UnknownName
from esperd.messages import Message, Reply
from esperd.messages.control import ActorList, ListActors

NO_ACTORS = ActorList(actors=(), dead_letters={})


def free_endpoint() -> str:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.asyncio
async def test_only_allowed_keys_are_let_in_and_a_revoked_one_is_refused_on_its_open_connection(tmp_path: Path) -> None:
    server, mine, other = (create_pair(tmp_path / f"{name}.key") for name in ("server", "mine", "other"))
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow("me", mine.public)
    refused: list[str] = []
    security = ServerSecurity(server, allowed, lambda reason, _: refused.append(reason))
    asked_by: list[bytes] = []

    async def answer(client: bytes, _message: Message) -> Reply:
        asked_by.append(client)
        return NO_ACTORS

    requests, events = free_endpoint(), free_endpoint()
    right, stranger = ClientSecurity(mine, server.public), ClientSecurity(other, server.public)
    async with (
        Gate(security),
        RequestServer(requests, answer, security=security),
        Publisher(events, security=security) as publisher,
    ):
        async with RequestClient(requests, security=right) as client:
            assert await client.request(ListActors()) == NO_ACTORS
            assert asked_by == [b"me"]
            async with Subscriber(events, ["job/1"], security=right) as watcher:
                told = b"told" * LARGEST_TOPIC_BYTES  # what watchers may send does not bound what they are sent
                await publisher.publish("job/1", told)
                assert await anext(watcher) == ("job/1", told)
            allowed.revoke("me")
            with pytest.raises(AuthenticationFailed, match="not allowed any more"):
                await client.request(ListActors())
        assert asked_by == [b"me"]
        for wrong, told in (
            (right, "esper keys allow"),
            (stranger, "esper keys allow"),
            (ClientSecurity(mine, other.public), "--server-key"),
            (None, "wants a key"),
        ):
            with pytest.raises(AuthenticationFailed, match=told):
                await RequestClient(requests, security=wrong).open()
            with pytest.raises(AuthenticationFailed, match=told):
                await Subscriber(events, ["job/1"], security=wrong).open()
        with anyio.fail_after(10):  # the monitor of the server may lag the client's
            while not {"revoked", "unknown_key", "wrong_server_key"} <= set(refused):  # noqa: ASYNC110
                await anyio.sleep(0.01)


@pytest.mark.asyncio
async def test_while_the_allow_list_cannot_be_read_nobody_is_allowed_and_the_server_goes_on(tmp_path: Path) -> None:
    server, mine = create_pair(tmp_path / "server.key"), create_pair(tmp_path / "mine.key")
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow("me", mine.public)
    refused: list[dict[str, str]] = []
    security = ServerSecurity(server, allowed, lambda _, facts: refused.append(facts))

    async def answer(_client: bytes, _message: Message) -> Reply:
        return NO_ACTORS

    endpoint = free_endpoint()
    async with (
        Gate(security),
        RequestServer(endpoint, answer, security=security) as requests,
        RequestClient(endpoint, security=ClientSecurity(mine, server.public)) as client,
    ):
        assert await client.request(ListActors()) == NO_ACTORS
        allowed.directory.rename(tmp_path / "away")
        allowed.directory.touch()  # no directory: as unreadable as one on a disk that fails
        with pytest.raises(AuthenticationFailed, match="cannot read who is allowed"):
            await client.request(ListActors())
        assert "Not a directory" in refused[-1]["error"]
        allowed.directory.unlink()
        (tmp_path / "away").rename(allowed.directory)
        assert await client.request(ListActors()) == NO_ACTORS
        assert requests.statistics().refused == 1


@pytest.mark.asyncio
async def test_without_its_gate_a_server_lets_nobody_in(tmp_path: Path) -> None:
    server, mine = create_pair(tmp_path / "server.key"), create_pair(tmp_path / "mine.key")
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow("me", mine.public)
    security = ServerSecurity(server, allowed, lambda *_: None)

    async def answer(_client: bytes, _message: Message) -> Reply:
        return NO_ACTORS

    endpoint = free_endpoint()
    async with RequestServer(endpoint, answer, security=security):
        with pytest.raises((AuthenticationFailed, DaemonUnreachable)):
            await RequestClient(endpoint, timeout_s=0.5, security=ClientSecurity(mine, server.public)).open()


def test_secret_keys_are_for_their_owner_alone_never_overwritten_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "mine.key"
    pair = create_pair(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_pair(file) == open_pair(file) == pair
    assert pair.secret.hex() not in repr(pair)
    assert str(pair.secret) not in repr(ClientSecurity(pair, pair.public))
    with pytest.raises(Conflict, match="exists"):
        create_pair(file)
    with pytest.raises(ConfigError, match="secret key") as caught:
        public_key(str(file))
    assert pair.secret.hex() not in str(caught.value) + str(caught.value.fields)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_pair(file)
    with pytest.raises(ConfigError, match="client-key"):
        security_of("tcp://127.0.0.1:1", "ab" * 32, None)


@pytest.mark.parametrize("name", ["", ".", "..", "../me", "a/b", "/etc/passwd", "a\0", "-x", "x" * 65, "é", "a\n"])
def test_no_name_of_a_key_leads_out_of_the_allow_list(tmp_path: Path, name: str) -> None:
    allowed = AllowList(tmp_path / "allowed")
    with pytest.raises(ConfigError, match="not a name"):
        allowed.allow(name, b"k" * 32)
    with pytest.raises(UnknownName):
        allowed.revoke(name)
    assert not list(tmp_path.rglob("*.pub"))


def test_a_key_whose_file_is_emptied_in_place_is_allowed_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, pair = AllowList(tmp_path), create_pair(tmp_path / "me.key")
    allowed.allow("me", pair.public)
    os.utime(tmp_path, ns=(0, 0))  # settled long ago, so that only the directory's own changes would be noticed
    assert pair.public in allowed.names()
    (tmp_path / "me.pub").write_text("")
    monkeypatch.setattr(keys, "READ_AGAIN_S", 0.0)
    assert allowed.names() == {}


def test_a_name_has_one_key_and_a_key_one_name(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow("me", b"a" * 32)
    allowed.allow("me", b"a" * 32)
    for name, key in (("me", b"b" * 32), ("you", b"a" * 32)):
        with pytest.raises(Conflict, match="revoke"):
            allowed.allow(name, key)
    assert allowed.names() == {b"a" * 32: "me"}


def test_a_file_that_root_writes_belongs_to_whoever_owns_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int, int]] = []

    def give(what: int | Path, user: int, group: int, **_: bool) -> None:
        path = Path(f"/proc/self/fd/{what}").resolve() if isinstance(what, int) else what
        given.append((path.parent.name if path.suffix else path.name, user, group))

    monkeypatch.setattr(keys.os, "geteuid", lambda: 0)
    monkeypatch.setattr(keys.os, "fchown", give)
    monkeypatch.setattr(keys.os, "chown", give)
    AllowList(tmp_path / "keys" / "allowed").allow("me", b"a" * 32)
    owner = tmp_path.stat()
    assert given == [(name, owner.st_uid, owner.st_gid) for name in ("keys", "allowed", "allowed")]


def test_a_list_that_cannot_be_read_allows_nobody_however_often_one_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = AllowList(tmp_path)
    allowed.allow("me", b"a" * 32)
    assert allowed.names()
    os.utime(tmp_path, (1, 1))  # the directory changed, long ago: what was read of it would be trusted

    def refuse(_path: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patches:
        patches.setattr(Path, "iterdir", refuse)
        for _ in range(3):
            with pytest.raises(PermissionError):
                allowed.names()
    assert allowed.names() == {b"a" * 32: "me"}


def test_a_file_that_allows_nobody_is_named_with_the_reason(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path)
    allowed.allow("me", b"a" * 32)
    (tmp_path / "you.pub").write_text("nonsense")
    (tmp_path / "folder.pub").mkdir()
    assert allowed.names() == {b"a" * 32: "me"}
    assert allowed.skipped == {"folder.pub": "Is a directory", "you.pub": "it holds no public key"}
