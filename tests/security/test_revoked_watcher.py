"""Who is allowed no more hears nothing of what happens from then on, and is told; who still is goes on hearing."""

from __future__ import annotations

import errno
from pathlib import Path

import anyio
import pytest
import zmq
from test_keys_and_gate import free_endpoint

from esperd.actors.clock import SystemClock
from esperd.actors.keys import ClientSecurity, create_pair, new_pair, open_pair
from esperd.actors.publication import Publisher, Subscriber
from esperd.actors.requests import RequestClient
from esperd.config import Config, Daemon, Network
from esperd.daemon import remote
from esperd.daemon.process import Status
from esperd.daemon.remote import RemoteDoor, allow_list, server_key_file
from esperd.errors import AddressUnavailable, AuthenticationFailed
from esperd.messages import Message, Reply
from esperd.messages.control import ActorList, ListActors
from esperd.telemetry.metrics import Metrics


@pytest.mark.asyncio
async def test_a_subscription_ends_with_an_error_once_its_clients_key_is_revoked_and_others_go_on(tmp_path: Path) -> None:
    mine, other = (create_pair(tmp_path / f"{name}.key") for name in ("mine", "other"))
    server = open_pair(server_key_file(tmp_path))
    allowed = allow_list(tmp_path)
    allowed.allow("me", mine.public)
    allowed.allow("other", other.public)
    events = free_endpoint()
    config = Config(daemon=Daemon(state_directory=str(tmp_path)), network=Network(listen=free_endpoint(), events=events))
    door = RemoteDoor(config, Metrics(), SystemClock())
    heard: dict[str, list[bytes]] = {"mine": [], "other": []}
    ended: list[AuthenticationFailed] = []
    async with door.publishing(), anyio.create_task_group() as tasks:

        async def listen(name: str, pair: object, *, task_status: anyio.abc.TaskStatus[None]) -> None:
            try:
                async with Subscriber(events, ["job/1"], security=ClientSecurity(pair, server.public)) as watcher:  # type: ignore[arg-type]
                    task_status.started()
                    async for _, payload in watcher:
                        heard[name].append(payload)
            except AuthenticationFailed as error:
                ended.append(error)

        async def tell_until(payload: bytes, *names: str) -> None:
            with anyio.fail_after(20):
                while not all(payload in heard[name] for name in names):
                    await door.publish("job/1", payload)
                    await anyio.sleep(0.02)

        await tasks.start(listen, "mine", mine)
        await tasks.start(listen, "other", other)
        await tell_until(b"before", "mine", "other")
        allowed.revoke("me")
        with anyio.fail_after(20):
            while not ended:  # noqa: ASYNC110 - what a monitor socket tells sets no event of ours
                await anyio.sleep(0.02)
        assert "does not allow the key" in str(ended[0])
        await tell_until(b"after", "other")
        assert b"after" not in heard["mine"]
        tasks.cancel_scope.cancel()


@pytest.mark.asyncio
async def test_a_port_that_cannot_be_bound_again_for_a_while_is_tried_again_and_shown_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away: list[int] = []

    class Bound(Publisher):
        async def __aenter__(self) -> Publisher:
            if away:
                raise zmq.ZMQError(away[0])
            return await super().__aenter__()

    monkeypatch.setattr(remote, "Publisher", Bound)
    monkeypatch.setattr(remote, "REBIND_TOLD_S", 0.0)
    allowed = allow_list(tmp_path)
    allowed.allow("me", new_pair().public)
    config = Config(daemon=Daemon(state_directory=str(tmp_path)), network=Network(listen=free_endpoint(), events=free_endpoint()))
    door = RemoteDoor(config, Metrics(), SystemClock())

    async def until_told(what: str) -> None:
        with anyio.fail_after(20):
            while what not in door.trouble or bool(what) != bool(door.trouble):  # noqa: ASYNC110 - it sets no event
                await anyio.sleep(0.01)

    async with door.publishing():
        away.append(errno.EADDRNOTAVAIL)
        allowed.revoke("me")
        await until_told("no interface that is up has this address")
        assert Status(starting=False, remote=door).not_ready() == [door.trouble]
        await door.publish("job/1", b"heard by nobody")
        away.clear()
        await until_told("")
    away.append(errno.EADDRNOTAVAIL)
    with pytest.raises(AddressUnavailable):
        await RemoteDoor(config, Metrics(), SystemClock()).publishing().__aenter__()


@pytest.mark.asyncio
async def test_all_who_come_without_keys_are_one_client(tmp_path: Path) -> None:
    asked_by: list[bytes] = []

    async def answer(client: bytes, _message: Message) -> Reply:
        asked_by.append(client)
        return ActorList(actors=(), dead_letters={})

    listen = free_endpoint()
    config = Config(daemon=Daemon(state_directory=str(tmp_path)), network=Network(listen=listen, curve=False))
    async with RemoteDoor(config, Metrics(), SystemClock()).answering(answer):
        for _ in range(2):
            async with RequestClient(listen) as client:
                await client.request(ListActors())
    assert len(set(asked_by)) == 1
