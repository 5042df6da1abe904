"""Asks a trigger whether this is a time to grow, before a strategy is asked what."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from esperd.declarations import resolve
from esperd.errors import HandlerFailed
from esperd.messages.policy import Decide, Decided, Decision, Signal

ALWAYS = "always"
"""The trigger that need not be asked."""


def with_signal(request: Decide, reference: str) -> Decide:
    """The request, with what its trigger says.

    Args:
        request: names the trigger in its settings.
        reference: ``"module:function"`` of that trigger, as it is registered.

    Raises:
        ImportFailed: when the trigger's code does not import.
        HandlerFailed: when it answers with something other than ``Signal``.
    """
    signal = checked(resolve(reference)(request), Signal, "trigger", request.settings.trigger)
    return msgspec.structs.replace(request, signal=signal)


AnswerT = TypeVar("AnswerT", Decided, Signal)


def checked(answer: object, wanted: type[AnswerT], kind: str, name: str) -> AnswerT:
    """What a plugin answered, its fields too: a struct is made without a look at their types, and what cannot be read again must
    not get into the log.

    Args:
        answer: as it was returned.
        wanted: what it must be.
        kind: ``strategy`` or ``trigger``.
        name: of it.

    Raises:
        HandlerFailed: when it is something else, or a field is of another type; the message says which.
    """
    who = f"{kind} {name!r}"
    if not isinstance(answer, wanted):
        raise HandlerFailed(f"{who} must answer with {wanted.__name__}, not {type(answer).__name__}", **{kind: name})
    try:
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=wanted)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise HandlerFailed(f"{who} answered with a {wanted.__name__} that is none: {error}", **{kind: name}) from error
    return read


def held_back(request: Decide) -> Decision | None:
    """The decision to wait when the trigger does not fire; None when it does.

    Raises:
        HandlerFailed: when a trigger other than ``always`` was not asked: whoever calls a strategy asks the trigger first.
    """
    name = request.settings.trigger
    if request.signal is None:
        if name == ALWAYS:
            return None
        raise HandlerFailed(
            f"trigger {name!r} was not asked before the strategy; call esperd.policy.trigger.with_signal first", trigger=name
        )
    return None if request.signal.fires else Decision(action="wait", reason=f"not now ({name}): {request.signal.reason}")
