"""What actors say to each other. Torch-free; one file per conversation."""

from __future__ import annotations

from typing import Union

from esperd.messages import control, dead_letters, failures, growth, jobs, kernels, leases, overruling, policy, telemetry
from esperd.messages.base import PROTOCOL_VERSION, Done, ErrorReply, Message, Reply, Value


def _leaves(kind: type[Message]) -> list[type[Message]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]
    return below if below or kind in (Message, Reply) else [kind]


MESSAGE_TYPES: tuple[type[Message], ...] = tuple(sorted(_leaves(Message), key=lambda kind: kind.__name__))
"""Every message of this protocol version. The codec decodes nothing else."""

AnyMessage = Union[MESSAGE_TYPES]  # type: ignore[valid-type]  # noqa: UP007 - built from the classes above, for the decoder

__all__ = [
    "MESSAGE_TYPES",
    "PROTOCOL_VERSION",
    "AnyMessage",
    "Done",
    "ErrorReply",
    "Message",
    "Reply",
    "Value",
    "control",
    "dead_letters",
    "failures",
    "growth",
    "jobs",
    "kernels",
    "leases",
    "overruling",
    "policy",
    "telemetry",
]
