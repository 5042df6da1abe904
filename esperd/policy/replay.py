"""Two answers to one decision point, compared: the one that was logged and the one that is computed now."""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from esperd.messages.policy import Decided, Decision


def difference(logged: Decided, again: Decided) -> str:
    """What differs, in words; empty when decisions and state are the same, byte for byte."""
    for number, (before, now) in enumerate(zip_longest(logged.decisions, again.decisions), start=1):
        if msgspec.msgpack.encode(before) != msgspec.msgpack.encode(now):
            return f"decision {number} was {_say(before)} and is now {_say(now)}"
    if logged.state != again.state:
        return (
            f"the decisions are the same, the strategy's state is not ({len(logged.state)} bytes logged, {len(again.state)} now)"
        )
    return ""


def _say(made: Decision | None) -> str:
    if made is None:
        return "not made"
    arm = f"{made.arm.blueprint} at {made.arm.slot}" if made.arm is not None else ""
    return f"'{' '.join(part for part in (made.action, made.seed or '', arm) if part)}: {made.reason}'"
