from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from esperd.actors.publication import Publisher, Subscriber
from esperd.errors import DaemonUnreachable, MalformedMessage


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/events.sock"


async def exchange(endpoint: str) -> None:
    async with Publisher(endpoint) as publisher, Subscriber(endpoint, ["job-1"]) as subscriber:
        await publisher.publish("job-1", b"first")
        await publisher.publish("job-2", b"not for us")
        await publisher.publish("job-1", b"second")
        with anyio.fail_after(5):
            assert [await anext(subscriber), await anext(subscriber)] == [("job-1", b"first"), ("job-1", b"second")]


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_a_subscriber_hears_everything_published_after_it_opened(endpoint: str, *, use_uvloop: bool) -> None:
    anyio.run(exchange, endpoint, backend_options={"use_uvloop": use_uvloop})


@pytest.mark.asyncio
async def test_a_topic_does_not_match_longer_ones(endpoint: str) -> None:
    async with Publisher(endpoint) as publisher, Subscriber(endpoint, ["job-1"]) as subscriber:
        await publisher.publish("job-10", b"other")
        await publisher.publish("job-1", b"ours")
        with anyio.fail_after(5):
            assert await anext(subscriber) == ("job-1", b"ours")


@pytest.mark.asyncio
async def test_no_topics_means_all(endpoint: str) -> None:
    async with Publisher(endpoint) as publisher, Subscriber(endpoint) as subscriber:
        for number in range(20):
            await publisher.publish(f"job-{number}", b"%d" % number)
        with anyio.fail_after(5):
            heard = [await anext(subscriber) for _ in range(20)]
    assert heard == [(f"job-{number}", b"%d" % number) for number in range(20)]


@pytest.mark.asyncio
async def test_a_watcher_that_does_not_read_never_holds_up_the_publisher(endpoint: str) -> None:
    async with Publisher(endpoint) as publisher, Subscriber(endpoint, ["job"]):
        with anyio.fail_after(20):
            for _ in range(30_000):
                await publisher.publish("job", b"x")


@pytest.mark.asyncio
async def test_what_is_published_while_another_subscribes_reaches_the_first(endpoint: str) -> None:
    async with Publisher(endpoint) as publisher, Subscriber(endpoint) as first:
        await publisher.publish("job", b"before")
        async with Subscriber(endpoint) as second:
            await publisher.publish("job", b"after")
            with anyio.fail_after(5):
                assert await anext(second) == ("job", b"after")
                assert [await anext(first), await anext(first)] == [("job", b"before"), ("job", b"after")]


@pytest.mark.asyncio
async def test_without_a_publisher_the_daemon_is_unreachable(endpoint: str) -> None:
    with pytest.raises(DaemonUnreachable, match="esperd run"):
        async with Subscriber(endpoint):
            pass


@pytest.mark.asyncio
async def test_a_closed_subscriber_ends_its_iteration(endpoint: str) -> None:
    async with Publisher(endpoint):
        async with Subscriber(endpoint) as subscriber:
            pass
        assert [item async for item in subscriber] == []


@pytest.mark.asyncio
@pytest.mark.parametrize("topic", ["", "a\x00b"])
async def test_a_topic_must_be_text_without_nul(endpoint: str, topic: str) -> None:
    async with Publisher(endpoint) as publisher:
        with pytest.raises(MalformedMessage):
            await publisher.publish(topic, b"")
        with pytest.raises(MalformedMessage):
            await Subscriber(endpoint, [topic]).open()


@pytest.mark.asyncio
async def test_publishing_outside_the_block_is_a_mistake_that_is_told(endpoint: str) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        await Publisher(endpoint).publish("job", b"")
