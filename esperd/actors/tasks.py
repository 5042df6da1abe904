"""Task groups whose one failure leaves as itself: callers catch ``ConfigError``, not a group of one ``ConfigError``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import anyio
import anyio.abc


def only_leaf(error: BaseException) -> BaseException | None:
    """The single exception inside nested groups; None when there are several."""
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


@contextlib.asynccontextmanager
async def open_task_group() -> AsyncGenerator[anyio.abc.TaskGroup, None]:
    """A task group. An exception of its block, or of one of its tasks, is raised bare; several come as a group."""
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        leaf = only_leaf(group)
        if leaf is None:
            raise
        raise leaf from leaf.__cause__
