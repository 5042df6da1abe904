"""The watching actor: what happens is logged first, then published, then counted, then shown to plugins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from esperd.actors.actor import Actor, handles
from esperd.errors import UnknownName
from esperd.messages.telemetry import (
    EVENT_TYPES,
    DecisionMade,
    Event,
    EventPage,
    EventsFound,
    FindEvents,
    GetEvents,
    Record,
    StageChanged,
)
from esperd.plugins import Plugins
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics
from esperd.telemetry.search import EventSearch

Publish = Callable[[str, bytes], Awaitable[None]]


def topic(job: str) -> str:
    """Where a job's events are published."""
    return f"job/{job}"


class TelemetryActor(Actor):
    """Handles :class:`Record`, :class:`GetEvents` and :class:`FindEvents`.

    Args:
        log: where events are kept. Who misses a publication reads it here.
        publish: hands bytes to the watchers of a topic; must not wait for them.
        metrics: counts events.
        plugins: told of decisions and of stages that changed.
    """

    def __init__(self, log: EventLog, publish: Publish, metrics: Metrics, plugins: Plugins) -> None:
        self._log = log
        self._search = EventSearch(log.database)
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

    @handles(FindEvents)
    async def find_events(self, message: FindEvents) -> EventsFound:
        """Events of every job, by type and time.

        Raises:
            UnknownName: when there is no event type of a name that was asked for.
        """
        for name in set(message.types).difference(EVENT_TYPES):
            known = list(EVENT_TYPES)
            raise UnknownName(f"there is no event type {name!r}; there are: {', '.join(known)}", name=name, available=known)
        return await self._search.find(message)

    def _notify(self, event: Event) -> None:
        match event.body:
            case DecisionMade() as decision:
                self._plugins.notify("esperd_decision", job=event.job, decision=decision)
            case StageChanged() as change:
                self._plugins.notify("esperd_stage_changed", job=event.job, change=change)
