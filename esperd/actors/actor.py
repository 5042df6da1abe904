"""What an actor is: a class whose typed handlers run one message at a time, in order, but for those that say otherwise.

An ask's exception belongs to the asker: it arrives there as a typed error, and the actor goes on. A failing tell has nobody
to go to: it ends the incarnation, and the supervisor decides what comes next.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

from esperd.actors.clock import Clock
from esperd.errors import HandlerFailed
from esperd.messages import Message, Reply

ASK_TIMEOUT_S = 30.0

ActorT = TypeVar("ActorT", bound="Actor")
MessageT = TypeVar("MessageT", bound=Message)

Method = Callable[[ActorT, MessageT], Awaitable[Reply | None]]

_HANDLES = "__esperd_handles__"
_CONCURRENT = "__esperd_concurrent__"


class Context(Protocol):
    """An actor's view of the system it lives in; the same inside the daemon and in a process of its own."""

    @property
    def name(self) -> str:
        """The actor's name: its address."""
        ...

    @property
    def generation(self) -> int:
        """The supervisor's count of this actor's incarnations."""
        ...

    @property
    def clock(self) -> Clock:
        """Time."""
        ...

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """Send a message to an actor and wait for its answer.

        Raises:
            ActorUnavailable: when there is no such actor, it stopped, is between two incarnations, or is the asker itself.
            AskTimeout: when no answer came in time.
            EsperError: of whatever class the actor answered with.
        """
        ...

    async def tell(self, to: str, message: Message) -> None:
        """Send a message to an actor, at most once; waits while its mailbox is full. A message that cannot be delivered
        becomes a dead letter.
        """
        ...

    async def watch(self, name: str) -> None:
        """From now on, be told :class:`~esperd.messages.control.Terminated` whenever an incarnation of an actor ends."""
        ...

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> None:
        """Run something beside the handlers, as long as this incarnation lives; its exception ends the incarnation."""
        ...


def handles(
    message_type: type[MessageT], *, concurrent: int = 1
) -> Callable[[Method[ActorT, MessageT]], Method[ActorT, MessageT]]:
    """Mark an async method ``(self, message) -> Reply | None`` as the handler of a message type.

    Args:
        message_type: what it takes.
        concurrent: how many asks of this type may be answered at the same time. Above 1 each runs beside the mail behind it,
            so that a slow answer keeps nobody waiting; the next one is refused with ``busy``. Such a handler meets others
            wherever it awaits. Tells are always handled one at a time.
    """

    def mark(method: Method[ActorT, MessageT]) -> Method[ActorT, MessageT]:
        setattr(method, _HANDLES, message_type)
        setattr(method, _CONCURRENT, concurrent)
        return method

    return mark


class Actor:
    """Base of every actor. State lives in attributes; only handlers touch it: without concurrent ones it needs no lock."""

    handlers: ClassVar[Mapping[type[Message], str]] = MappingProxyType({})
    """Method name by message type, inherited handlers included."""
    limits: ClassVar[Mapping[type[Message], int]] = MappingProxyType({})
    """How many asks of a type are answered at the same time."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        found, limits = dict(cls.handlers), dict(cls.limits)
        for name, member in vars(cls).items():
            message_type = getattr(member, _HANDLES, None)
            if message_type is None:
                continue
            if found.get(message_type, name) != name and found[message_type] in vars(cls):
                raise TypeError(f"{cls.__name__} has two handlers of {message_type.__name__}: {found[message_type]}, {name}")
            found[message_type] = name
            limits[message_type] = getattr(member, _CONCURRENT)
        cls.handlers = MappingProxyType(found)
        cls.limits = MappingProxyType(limits)

    async def on_start(self, context: Context) -> None:
        """Called once, before the first message. An exception here is a failed start."""

    async def on_stop(self) -> None:
        """Called once after the last message, when the actor was asked to stop; not after a crash."""

    async def handle(self, message: Message) -> Reply | None:
        """Run the handler of a message.

        Raises:
            HandlerFailed: when there is none.
            Exception: whatever the handler raises.
        """
        name = self.handlers.get(type(message))
        if name is None:
            known = sorted(kind.__name__ for kind in self.handlers)
            raise HandlerFailed(
                f"{type(self).__name__} does not handle {type(message).__name__}; it handles: {', '.join(known) or 'nothing'}",
                message_type=type(message).__name__,
                handles=known,
            )
        answer: Reply | None = await getattr(self, name)(message)
        return answer

    def concurrency(self, message: Message) -> int:
        """How many asks of this message's type are answered at the same time."""
        return self.limits.get(type(message), 1)

    def can_handle(self, message: Message) -> bool:
        """Whether there is a handler for this message."""
        return type(message) in self.handlers
