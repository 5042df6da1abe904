"""Dead letters can be listed, shown, delivered again and dropped; they are kept within bounds."""

from __future__ import annotations

import asyncio

import pytest

from esperd.actors.actor import Actor, handles
from esperd.actors.dead_letters import DeadLetter, DeadLetters, Reason
from esperd.actors.spec import ChildSpec
from esperd.actors.system import ActorSystem
from esperd.daemon.front_door import FrontDoor
from esperd.errors import ActorUnavailable, Conflict, HandlerFailed, NothingToShow
from esperd.messages import Done
from esperd.messages.control import ListActors
from esperd.messages.dead_letters import DropDeadLetters, ListDeadLetters, RetryDeadLetter, ShowDeadLetter
from esperd.messages.jobs import ArtifactChunk, Budget, GetJob, Job, SubmitJob
from esperd.plugins import load_plugins


class Moody(Actor):
    """Refuses as long as it is told to."""

    refuses = True
    got: list[str]

    def __init__(self) -> None:
        self.got = []

    @handles(GetJob)
    async def take(self, message: GetJob) -> None:
        """Refuse, or take."""
        await asyncio.sleep(0)
        if type(self).refuses:
            raise ValueError("not now")
        self.got.append(message.id)


def letter(size: int) -> DeadLetter:
    """One with this many bytes of payload."""
    chunk = ArtifactChunk(data=bytes(size), offset=0, size_bytes=size)
    return DeadLetter(at=1.0, reason=Reason.MAILBOX_FULL, to="somebody", sender="me", message=chunk)


@pytest.mark.asyncio
async def test_a_dead_letter_is_listed_shown_and_delivered_to_the_present_incarnation_once_it_can_be(monkeypatch):
    monkeypatch.setattr(Moody, "refuses", True)
    async with ActorSystem() as system:
        door = FrontDoor(system, load_plugins(), "ipc:///nowhere")
        await system.tell("moody", GetJob(id="j1"), sender="me")

        [listed] = (await door.answer(b"", ListDeadLetters())).letters
        assert (listed.id, listed.reason, listed.message_type) == (1, "no_such_actor", "GetJob")
        assert (listed.sender, listed.to) == ("me", "moody")
        assert '"j1"' in (await door.answer(b"", ShowDeadLetter(id=1))).body

        with pytest.raises(ActorUnavailable):
            await door.answer(b"", RetryDeadLetter(id=1))
        await system.start(ChildSpec("moody", Moody))
        with pytest.raises(HandlerFailed, match="not now"):
            await door.answer(b"", RetryDeadLetter(id=1))
        [status] = system.status()
        assert status.generation == 1, "a failing retry ends no actor"
        assert [kept.id for kept in (await door.answer(b"", ListDeadLetters())).letters] == [1], "a failed retry keeps the letter"

        monkeypatch.setattr(Moody, "refuses", False)
        outcomes = await asyncio.gather(
            door.answer(b"", RetryDeadLetter(id=1)), door.answer(b"", RetryDeadLetter(id=1)), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == [Done.__name__, NothingToShow.__name__]
        assert system.status()[0].handled == 2
        listed = await door.answer(b"", ListDeadLetters())
        assert listed.letters == ()
        assert listed.counts == {"no_such_actor": 1}


@pytest.mark.asyncio
async def test_dead_letters_are_dropped_one_by_one_or_all_and_stay_counted():
    async with ActorSystem() as system:
        door = FrontDoor(system, load_plugins(), "ipc:///nowhere")
        for _ in range(3):
            await system.tell("nobody", ListActors())
        assert (await door.answer(b"", DropDeadLetters(id=2))).dropped == 1
        assert [kept.id for kept in (await door.answer(b"", ListDeadLetters())).letters] == [3, 1]
        assert (await door.answer(b"", DropDeadLetters())).dropped == 2
        with pytest.raises(NothingToShow, match="dead letter 3"):
            await door.answer(b"", ShowDeadLetter(id=3))
        assert door.actors().dead_letters == {"no_such_actor": 3}


def test_the_oldest_make_room_by_count_and_by_bytes_and_a_huge_message_is_not_kept():
    letters = DeadLetters(kept=3, max_bytes=10_000)
    for _ in range(5):
        letters.add(letter(10))
    assert [kept.id for kept in letters.newest(10)] == [5, 4, 3]
    letters.add(letter(9_950))
    assert [kept.id for kept in letters.newest(10)] == [6]
    letters.add(letter(20_000))
    [huge, large] = letters.newest(10)
    assert (huge.letter.message, large.letter.message is None) == (None, False)
    assert "20" in huge.letter.detail
    assert letters.counts == {"mailbox_full": 7}


@pytest.mark.asyncio
async def test_a_submission_is_delivered_again_by_nobody_but_its_client():
    async with ActorSystem() as system:
        job = Job(host="cnn", data="digits", budget=Budget(epochs=1))
        await system.tell("jobs", SubmitJob(job=job, idempotency_key="k"), sender="me")
        with pytest.raises(Conflict, match="under its key"):
            await FrontDoor(system, load_plugins(), "ipc:///nowhere").answer(b"", RetryDeadLetter(id=1))
