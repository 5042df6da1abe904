from __future__ import annotations

from collections import deque

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.actors.mailbox import Mailbox, payload_bytes
from esperd.errors import ActorUnavailable, Busy
from esperd.messages import Done, Message


class Load(Message, frozen=True, kw_only=True):
    content: bytes
    note: str = ""


@pytest.mark.asyncio
async def test_mail_is_read_in_the_order_it_was_put() -> None:
    box: Mailbox[int] = Mailbox("a")
    for number in range(5):
        await box.put(number)
    assert [await box.get() for _ in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.asyncio
async def test_control_mail_overtakes() -> None:
    box: Mailbox[str] = Mailbox("a")
    await box.put("first")
    box.put_control("stop")
    assert [await box.get(), await box.get()] == ["stop", "first"]


@pytest.mark.asyncio
async def test_a_full_mailbox_refuses_who_cannot_wait_and_says_when_to_try_again() -> None:
    box: Mailbox[int] = Mailbox("policy", max_messages=2)
    box.put_nowait(1)
    box.put_nowait(2)
    with pytest.raises(Busy, match="policy") as caught:
        box.put_nowait(3)
    assert caught.value.fields["retry_after_s"] == 0.1
    assert box.statistics().refused == 1


@pytest.mark.asyncio
async def test_control_mail_passes_a_full_mailbox_but_is_bounded_itself() -> None:
    box: Mailbox[int] = Mailbox("a", max_messages=1, max_control=1)
    box.put_nowait(1)
    box.put_control(2)
    with pytest.raises(Busy):
        box.put_control(3)


@pytest.mark.asyncio
async def test_senders_wait_for_room_and_are_admitted_in_their_order() -> None:
    box: Mailbox[int] = Mailbox("a", max_messages=1)
    await box.put(0)
    async with anyio.create_task_group() as tasks:
        for number in (1, 2, 3):
            tasks.start_soon(box.put, number)
        await anyio.wait_all_tasks_blocked()
        assert box.statistics().waiting_senders == 3
        assert [await box.get() for _ in range(4)] == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_a_mailbox_is_full_by_bytes() -> None:
    box: Mailbox[str] = Mailbox("a", max_bytes=100)
    box.put_nowait("half", size_bytes=60)
    with pytest.raises(Busy):
        box.put_nowait("more", size_bytes=60)
    await box.get()
    box.put_nowait("more", size_bytes=60)
    assert box.statistics().size_bytes == 60


@pytest.mark.asyncio
async def test_a_message_larger_than_the_mailbox_is_admitted_alone() -> None:
    box: Mailbox[str] = Mailbox("a", max_bytes=10)
    await box.put("huge", size_bytes=1_000)
    with pytest.raises(Busy):
        box.put_nowait("small", size_bytes=1)
    assert await box.get() == "huge"


@pytest.mark.asyncio
async def test_a_sender_that_gives_up_leaves_nothing_behind_and_blocks_nobody() -> None:
    box: Mailbox[str] = Mailbox("a", max_messages=2, max_bytes=10)
    await box.put("first", size_bytes=8)
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            tasks.start_soon(_cancel_when_blocked, scope)
            await box.put("large", size_bytes=8)
        await box.put("small", size_bytes=2)
    assert [await box.get(), await box.get()] == ["first", "small"]


async def _cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


@pytest.mark.asyncio
async def test_closing_returns_the_unread_mail_and_turns_waiting_senders_away() -> None:
    box: Mailbox[int] = Mailbox("cache", max_messages=1)
    await box.put(1)
    box.put_control(0)

    async def refused() -> None:
        with pytest.raises(ActorUnavailable, match="cache"):
            await box.put(2)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refused)
        await anyio.wait_all_tasks_blocked()
        assert box.close() == [0, 1]
    with pytest.raises(ActorUnavailable):
        box.put_nowait(3)
    with pytest.raises(ActorUnavailable):
        box.put_control(3)


@pytest.mark.asyncio
async def test_a_reader_waits_for_mail_and_a_cancelled_read_loses_nothing() -> None:
    box: Mailbox[int] = Mailbox("a")
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            tasks.start_soon(_cancel_when_blocked, scope)
            await box.get()
    box.put_nowait(1)
    assert await box.get() == 1


def test_the_size_of_a_message_is_that_of_its_byte_fields() -> None:
    assert payload_bytes(Load(content=b"12345", note="not counted")) == 5
    assert payload_bytes(Done()) == 0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()) | st.none(), max_size=60),
    st.integers(1, 6),
    st.integers(1, 80),
)
def test_a_mailbox_behaves_like_two_bounded_queues(
    steps: list[tuple[int, bool] | None], max_messages: int, max_bytes: int
) -> None:
    async def run() -> None:
        box: Mailbox[int] = Mailbox("a", max_messages=max_messages, max_bytes=max_bytes, max_control=3)
        control: deque[int] = deque()
        ordinary: deque[tuple[int, int]] = deque()
        for number, step in enumerate(steps):
            if step is None:
                if control:
                    assert await box.get() == control.popleft()
                elif ordinary:
                    assert await box.get() == ordinary.popleft()[0]
            elif step[1]:
                fits = len(control) < 3
                try:
                    box.put_control(number)
                    assert fits
                    control.append(number)
                except Busy:
                    assert not fits
            else:
                held = sum(size for _, size in ordinary)
                fits = len(ordinary) < max_messages and (not ordinary or held + step[0] <= max_bytes)
                try:
                    box.put_nowait(number, size_bytes=step[0])
                    assert fits
                    ordinary.append((number, step[0]))
                except Busy:
                    assert not fits
            statistics = box.statistics()
            assert statistics.depth == len(control) + len(ordinary)
            assert statistics.size_bytes == sum(size for _, size in ordinary)

    anyio.run(run)
