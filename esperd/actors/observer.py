"""Who counts what actors do: told of every message, and of how long it waited and took."""

from __future__ import annotations

from typing import Protocol

from esperd.errors import EsperError
from esperd.messages import ErrorReply, Message, Reply

ANSWERED = "answered"
TOLD = "told"
"""A tell that was handled; for a process: one that was handed to it."""


class Observer(Protocol):
    """Takes note; must not wait, and must not raise."""

    def observe_message(self, actor: str, kind: str, result: str) -> None:
        """A message to an actor came to its end: :data:`ANSWERED`, :data:`TOLD`, or the code of an error."""
        ...

    def observe_wait(self, actor: str, seconds: float) -> None:
        """A message lay this long in an actor's mailbox, and before it, before it was taken out."""
        ...

    def observe_handled(self, actor: str, seconds: float) -> None:
        """A handler in this process ran this long."""
        ...


class Unobserved:
    """Nobody counts."""

    def observe_message(self, actor: str, kind: str, result: str) -> None:
        """Not counted."""

    def observe_wait(self, actor: str, seconds: float) -> None:
        """Not counted."""

    def observe_handled(self, actor: str, seconds: float) -> None:
        """Not counted."""


def result_name(outcome: Reply | EsperError) -> str:
    """How an ask ended, in a word."""
    if isinstance(outcome, ErrorReply | EsperError):
        return outcome.code
    return ANSWERED


def kind_of(message: Message) -> str:
    """What kind of message it is: there are as many as there are classes."""
    return type(message).__name__
