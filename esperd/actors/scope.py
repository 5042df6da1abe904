"""What surrounds a handler: the span it works under, and what every line it logs carries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import structlog

from esperd import tracing
from esperd.messages import Message

_NAMES_A_JOB = ("job", "job_id")
_NOTHING = contextlib.nullcontext()


def job_of(message: Message) -> str:
    """Which job a message is about; empty when it is about none, or about one that has no id yet."""
    for field in _NAMES_A_JOB:
        value = getattr(message, field, None)
        if isinstance(value, str):
            return value
    return ""


def handling(actor: str, message: Message, traceparent: str) -> AbstractContextManager[object]:
    """Work under the span that the sender was in, if it was in any: a message that nobody traces begins no trace.

    Log lines of the block carry the job that the message is about, and the trace.
    """
    job = job_of(message)
    bound: AbstractContextManager[object] = structlog.contextvars.bound_contextvars(job=job) if job else _NOTHING
    return _traced(actor, message, traceparent, job, bound) if traceparent else bound


@contextlib.contextmanager
def _traced(actor: str, message: Message, traceparent: str, job: str, bound: AbstractContextManager[object]) -> Iterator[None]:
    attributes = {"job": job} if job else {}
    name = f"{actor.partition('/')[0]} {type(message).__name__}"
    with bound, tracing.span(name, parent=traceparent, actor=actor, **attributes):
        yield
