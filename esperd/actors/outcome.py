"""How an ask ends: a reply, or an error that crosses wires as a value and is raised again where the asker waits."""

from __future__ import annotations

import traceback

from esperd.errors import EsperError, HandlerFailed, WireValue, error_from_code
from esperd.messages import Done, ErrorReply, Reply

WIDEST_INTEGER = 2**63 - 1


def _plain(value: object) -> WireValue:
    """A field as msgpack can carry it: an error must never fail to be reported because of what it mentions."""
    if isinstance(value, bool | float | str) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= WIDEST_INTEGER else str(value)
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return str(value)


def error_reply(error: BaseException, *, actor: str, message: object) -> ErrorReply:
    """An exception as a value: an :class:`EsperError` keeps its code, anything else becomes ``handler_failed``.

    Args:
        error: what a handler raised.
        actor: whose handler.
        message: what it was handling.
    """
    if not isinstance(error, EsperError):
        error = HandlerFailed(
            f"{actor} failed on {type(message).__name__}: {type(error).__name__}: {error}",
            actor=actor,
            message_type=type(message).__name__,
            exception=type(error).__name__,
            traceback="".join(traceback.format_exception(error)),
        )
    return ErrorReply(
        code=error.code, message=error.message, fields={name: _plain(value) for name, value in error.fields.items()}
    )


def result_of(reply: Reply) -> Reply:
    """The reply itself.

    Raises:
        EsperError: of the matching class, when the reply is an error.
    """
    if isinstance(reply, ErrorReply):
        raise error_from_code(reply.code, reply.message, dict(reply.fields))
    return reply


def answer_of(returned: object, *, actor: str, message: object) -> Reply:
    """What a handler returned, as an answer: nothing means :class:`Done`.

    Raises:
        HandlerFailed: when it returned something that is not a reply.
    """
    if returned is None:
        return Done()
    if not isinstance(returned, Reply):
        raise HandlerFailed(
            f"{actor} answered {type(message).__name__} with a {type(returned).__name__}, which is not a Reply",
            actor=actor,
            message_type=type(message).__name__,
        )
    return returned
