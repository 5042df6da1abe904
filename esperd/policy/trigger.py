"""Asks a trigger whether this is a time to grow, before a strategy is asked what."""

from __future__ import annotations

import msgspec

from esperd.declarations import resolve
from esperd.errors import HandlerFailed
from esperd.messages.policy import Decide, Decision, Signal

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
    signal = resolve(reference)(request)
    if not isinstance(signal, Signal):
        name = request.settings.trigger
        raise HandlerFailed(f"trigger {name!r} must answer with Signal, not {type(signal).__name__}", trigger=name)
    return msgspec.structs.replace(request, signal=signal)


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
