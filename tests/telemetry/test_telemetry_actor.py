from __future__ import annotations

import msgspec
import pytest

from esperd.hookspecs import hookimpl
from esperd.messages.growth import Stage
from esperd.messages.policy import Decision
from esperd.messages.telemetry import (
    CheckpointSaved,
    DecisionMade,
    Event,
    EventPage,
    GetEvents,
    NewEvent,
    Record,
    StageChanged,
)
from esperd.plugins import Plugins
from esperd.store.database import Database
from esperd.telemetry.actor import TelemetryActor
from esperd.telemetry.log import MIGRATIONS, EventLog
from esperd.telemetry.metrics import Metrics

SAVED = CheckpointSaved(epoch=1, sha256="a" * 64, size_bytes=1, seconds=0.1)
DECIDED = DecisionMade(epoch=1, decision=Decision(action="wait", reason="early"), applied=True)
CULLED = StageChanged(epoch=1, seed="s#1", slot="s", blueprint="b", before=Stage.TRAINING, after=Stage.CULLED, reason="unstable")


class Watcher:
    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, payload: bytes) -> None:
        self.published.append((topic, payload))


class Observer:
    def __init__(self) -> None:
        self.seen = []

    @hookimpl
    def esperd_decision(self, job, decision):
        self.seen.append((job, decision))

    @hookimpl
    def esperd_stage_changed(self, change):
        self.seen.append(change)


class Raiser:
    @hookimpl
    def esperd_decision(self, job):
        raise ZeroDivisionError(job)


def record(*bodies, key: str = "1") -> Record:
    return Record(job="j1", key=key, events=tuple(NewEvent(at=1.0, body=body) for body in bodies))


@pytest.mark.asyncio
async def test_what_is_recorded_is_logged_published_counted_and_shown_to_plugins(tmp_path):
    watcher, observer, metrics, plugins = Watcher(), Observer(), Metrics(), Plugins()
    plugins.add("observer", observer)
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        actor = TelemetryActor(EventLog(database), watcher.publish, metrics, plugins)
        assert await actor.handle(record(SAVED, DECIDED, CULLED)) is None
        page = await actor.handle(GetEvents(job="j1", after=1))
    expected = [Event(job="j1", sequence=n, at=1.0, body=body) for n, body in enumerate((SAVED, DECIDED, CULLED), start=1)]
    assert page == EventPage(events=tuple(expected[1:]), more=False)
    assert [topic for topic, _ in watcher.published] == ["job/j1"] * 3
    assert [msgspec.msgpack.decode(payload, type=Event) for _, payload in watcher.published] == expected
    assert observer.seen == [("j1", DECIDED), CULLED]
    assert b'esperd_events_total{type="CheckpointSaved"} 1.0' in metrics.render()


@pytest.mark.asyncio
async def test_a_repeated_batch_is_announced_once(tmp_path):
    watcher, metrics = Watcher(), Metrics()
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        actor = TelemetryActor(EventLog(database), watcher.publish, metrics, Plugins())
        await actor.handle(record(SAVED))
        await actor.handle(record(SAVED))
        await actor.handle(record(SAVED, key="2"))
    assert len(watcher.published) == 2
    assert b'esperd_events_total{type="CheckpointSaved"} 2.0' in metrics.render()


@pytest.mark.asyncio
async def test_a_plugin_that_raises_disturbs_nobody(tmp_path):
    watcher, observer, plugins = Watcher(), Observer(), Plugins()
    plugins.add("raiser", Raiser())
    plugins.add("observer", observer)
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        actor = TelemetryActor(EventLog(database), watcher.publish, Metrics(), plugins)
        await actor.handle(record(DECIDED))
    assert len(watcher.published) == 1
    assert observer.seen == [("j1", DECIDED)]
    assert "ZeroDivisionError" in next(entry.error for entry in plugins.records() if entry.name == "raiser")
