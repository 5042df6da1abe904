"""The watching actor: what happens is logged first, then published, then counted, then shown to plugins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from esperd.actors.actor import Actor, handles
from esperd.messages.telemetry import DecisionMade, Event, EventPage, GetEvents, Record, StageChanged
from esperd.plugins import Plugins
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics

Publish = Callable[[str, bytes], Awaitable[None]]


def topic(job: str) -> str:
    """Where a job's events are published."""
    return f"job/{job}"


class TelemetryActor(Actor):
    """Handles :class:`Record` and :class:`GetEvents`.

    Args:
        log: where events are kept. Who misses a publication reads it here.
        publish: hands bytes to the watchers of a topic; must not wait for them.
        metrics: counts events.
        plugins: told of decisions and of stages that changed.
    """

    def __init__(self, log: EventLog, publish: Publish, metrics: Metrics, plugins: Plugins) -> None:
        self._log = log
        self._publish = publish
        self._metrics = metrics
        self._plugins = plugins

    @handles(Record)
    async def record(self, message: Record) -> None:
        """Append and announce; a batch that was recorded before is neither."""
        for event in await self._log.append(message.job, message.key, message.events):
            await self._publish(topic(event.job), msgspec.msgpack.encode(event))
            self._metrics.observe_event(event)
            self._notify(event)

    @handles(GetEvents)
    async def get_events(self, message: GetEvents) -> EventPage:
        """A page of a job's events."""
        return await self._log.page(message.job, message.after, message.limit)

    def _notify(self, event: Event) -> None:
        match event.body:
            case DecisionMade() as decision:
                self._plugins.notify("esperd_decision", job=event.job, decision=decision)
            case StageChanged() as change:
                self._plugins.notify("esperd_stage_changed", job=event.job, change=change)
