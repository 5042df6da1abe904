"""The actor of Thespian in ``messaging.py``: in a module of its own, because Thespian imports it by name elsewhere."""

from __future__ import annotations

from thespian.actors import Actor


class Echo(Actor):
    """Takes bytes, gives a word."""

    def receiveMessage(self, message: object, sender: object) -> None:  # noqa: N802 - Thespian's name
        """Answer bytes; whatever else comes is Thespian's own."""
        if isinstance(message, bytes):
            self.send(sender, "done")
