"""What a daemon is at, for a person who asks with SIGUSR1: one log record for each actor and each task, and what died.

Names, numbers, places in code. Never a value: no local variable, no message, nothing that a job or a client said.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import msgspec

from esperd.logs import unfiltered
from esperd.messages.control import ActorStatus

DEEPEST = 64
"""Calls of one task that are told; chosen, not measured."""


def dump(actors: Iterable[ActorStatus], dead_letters: Mapping[str, int], tasks: Iterable[asyncio.Task[Any]]) -> int:
    """Write everything to the log, whatever its level; returns how many records.

    Args:
        actors: as ``esper actors`` shows them.
        dead_letters: counts by reason.
        tasks: of the event loop.
    """
    asked = unfiltered()
    records = 0
    for actor in actors:
        asked.info("dump: actor", **{name: value for name, value in msgspec.to_builtins(actor).items() if name != "last_error"})
        records += 1
    for task in sorted(tasks, key=lambda task: task.get_name()):
        asked.info("dump: task", task=task.get_name(), stack=list(stack_of(task)))
        records += 1
    asked.info("dump: dead letters", counts=dict(dead_letters))
    asked.info("dump: done", records=records + 2, threads=sorted(thread.name for thread in threading.enumerate()))
    return records + 2


def stack_of(task: asyncio.Task[Any]) -> Iterator[str]:
    """Where a task waits, outermost call first: ``file:line function``. ``Task.get_stack`` tells only the outermost one."""
    waiting: object = task.get_coro()
    for _ in range(DEEPEST):
        if waiting is None:
            return
        frame, waiting = _step(waiting)
        if frame is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"


def _step(waiting: object) -> tuple[FrameType | None, object]:
    """The frame of something that waits, and what it waits for."""
    if isinstance(waiting, Coroutine):
        return getattr(waiting, "cr_frame", None), getattr(waiting, "cr_await", None)
    if inspect.isgenerator(waiting):
        return waiting.gi_frame, waiting.gi_yieldfrom
    return None, None
