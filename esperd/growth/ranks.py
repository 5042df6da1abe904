"""Several processes that grow one network together: what they tell each other, and what happens when one of them differs.

Everything is decided once. Processes meet at points that all of them come to; there each says what it found, or that it failed,
so that nobody waits for a process that will never come. Values travel as msgpack, never as pickles. They travel over a gloo
group of their own, whatever the gradients travel over: NCCL would need the device for a few bytes, and ends the process where
gloo raises.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist

from esperd.errors import RankFailed, RanksDisagree

ValueT = TypeVar("ValueT")

TIMEOUT_S = 600.0
"""How long a process waits for the others at a meeting. Long enough for one of them to compile a kernel; as long as torch's own
default for NCCL."""

MOST_DIFFERENCES = 8
"""Differences that a message lists."""


class Ranks(Protocol):
    """The processes that grow one network."""

    rank: int
    """This one's number, from 0."""
    size: int
    """How many there are."""

    def together(self, what: str) -> AbstractContextManager[None]:
        """All ranks do the same inside; one that raises tells the others, which then raise :class:`RankFailed`."""
        ...

    def stepping(self) -> AbstractContextManager[None]:
        """A training step inside :meth:`together`: one that raises there tells nobody, because the others may be waiting for its
        gradients and not at a meeting; its end is what they hear of.
        """
        ...

    def gather(self, what: str, value: ValueT) -> list[ValueT]:
        """What each rank says, by rank."""
        ...

    def first(self, what: str, value: ValueT | None, kind: type[ValueT] | None = None) -> ValueT:
        """What rank 0 says, on every rank.

        Args:
            what: names it in messages; the same on every rank.
            value: on rank 0 what counts; on the others it does not matter.
            kind: its type; needed where ``value`` is None.
        """
        ...

    def agree(self, what: str, value: object) -> None:
        """All ranks say the same.

        Raises:
            RanksDisagree: they do not; on every rank, naming both values.
        """
        ...

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        ...

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with their mean over the ranks."""
        ...


class Alone:
    """One process: it agrees with itself."""

    rank = 0
    size = 1

    def together(self, what: str) -> AbstractContextManager[None]:  # noqa: ARG002 - as in Ranks
        """Nobody has to be told."""
        return nullcontext()

    def stepping(self) -> AbstractContextManager[None]:
        """Nobody waits."""
        return nullcontext()

    def gather(self, what: str, value: ValueT) -> list[ValueT]:  # noqa: ARG002 - as in Ranks
        """What this process says."""
        return [value]

    def first(self, what: str, value: ValueT | None, kind: type[ValueT] | None = None) -> ValueT:  # noqa: ARG002 - as in Ranks
        """What this process says.

        Raises:
            ValueError: it says nothing.
        """
        if value is None:
            raise ValueError(f"this process is rank 0 and has to say {what}")
        return value

    def agree(self, what: str, value: object) -> None:
        """It does."""

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """They are rank 0's."""

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """They are their own mean."""


class _Word(msgspec.Struct, frozen=True):
    """What one rank says at a meeting."""

    what: str
    payload: bytes = b""
    failed: str = ""
    """Name of the exception it raised instead of coming here; empty when it came."""
    message: str = ""


class Joined:
    """The processes of ``torch.distributed``, which ``init_process_group`` has brought together. Every process makes one.

    After a rank failed, or differed, these ranks have parted: whatever they are asked next raises at once.

    Args:
        timeout_s: how long to wait for the others at a meeting, in seconds. What travels by ``follow`` and ``average``, and
            torch's ``DistributedDataParallel``, wait as long as ``init_process_group`` was told.

    Raises:
        ValueError: ``init_process_group`` was not called.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._meetings = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=timeout_s))
        self._encode = msgspec.msgpack.Encoder(order="deterministic").encode
        self._inside = False
        self._parted = ""
        """Why these ranks cannot go on together; empty while they can."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Joined:
        """The same processes: a copy of a grower is one among the same ranks."""
        return self

    # --- meetings --------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All ranks do the same inside. A rank that raises says so at the next meeting, wherever in ``what`` the others are.

        Args:
            what: is done; the same on every rank. Inside another ``together`` nothing changes: the outer one tells.

        Raises:
            RankFailed: another rank raised; names it and its error.
            RanksDisagree: the ranks came to different ends.
        """
        if self._inside:
            yield
            return
        self._inside = True
        try:
            yield
        except Exception as error:
            if not self._parted:  # where they have parted every rank knows
                self._tell(what, error)
            raise
        else:
            self._meet(f"the end of {what}")
        finally:
            self._inside = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A training step inside :meth:`together`: who raises there parts from the others without a word, because they
        wait for its gradients and would not hear it.
        """
        try:
            yield
        except Exception as error:
            self._parted = f"rank {self.rank} raised {type(error).__name__} in a training step"
            raise

    def gather(self, what: str, value: ValueT) -> list[ValueT]:
        """What each rank says, by rank.

        Raises:
            RankFailed: another rank raised, or is not heard of.
            RanksDisagree: another rank came to another point.
        """
        payloads = self._meet(what, self._encode(value))
        return [msgspec.msgpack.decode(payload, type=type(value)) for payload in payloads]

    def first(self, what: str, value: ValueT | None, kind: type[ValueT] | None = None) -> ValueT:
        """What rank 0 says, on every rank.

        Raises:
            RankFailed: another rank raised, or is not heard of.
            RanksDisagree: another rank came to another point.
            ValueError: there is no telling what type it has: ``value`` is None and no ``kind`` is given.
        """
        if value is None and kind is None:
            raise ValueError(f"rank {self.rank} does not say of what kind {what} is")
        payload = self._meet(what, self._encode(value) if self.rank == 0 else b"")[0]
        return msgspec.msgpack.decode(payload, type=kind or type(value))  # type: ignore[return-value]  # None has a kind

    def agree(self, what: str, value: object) -> None:
        """All ranks say the same.

        Raises:
            RankFailed: another rank raised, or is not heard of.
            RanksDisagree: they do not say the same; on every rank, naming both values.
        """
        payloads = self._meet(what, self._encode(value))
        others = [rank for rank, payload in enumerate(payloads) if payload != payloads[0]]
        if not others:
            return
        said = _differences(payloads[0], payloads[others[0]], others[0])
        more = f" (so do ranks {', '.join(map(str, others[1:]))}, or in another way)" if others[1:] else ""
        self._disagree(
            f"ranks disagree on {what}: {said}{more}",
            "give every process the same settings, code and splits, and let nothing that is decided depend on the rank",
            what=what,
            ranks=["0", *map(str, others)],
        )

    def _tell(self, what: str, error: Exception) -> None:
        """Say that this rank raised. Where all of them raised the same kind of error they are still together."""
        try:
            words = self._exchange(_Word(what, failed=type(error).__name__, message=str(error)))
        except RankFailed as unheard:
            error.add_note(f"The other ranks could not be told: {unheard}")
            return
        if {word.failed for word in words} != {type(error).__name__}:
            self._parted = f"rank {self.rank} raised {type(error).__name__} in {what}"

    def _meet(self, what: str, payload: bytes = b"") -> list[bytes]:
        """Come to a point that every rank comes to; what each of them says there, by rank."""
        words = self._exchange(_Word(what, payload))
        for rank, word in enumerate(words):
            if word.failed:
                self._fail(
                    f"rank {rank} raised {word.failed} in {word.what}: {word.message}",
                    f"rank {self.rank} had come to {what}",
                    what=what,
                    rank=rank,
                    error=word.failed,
                )
        for rank, word in enumerate(words):
            if word.what != words[0].what:
                self._disagree(
                    f"ranks came to different points: rank 0 to {words[0].what}, rank {rank} to {word.what}",
                    "every process must take the same steps and the same decisions in the same order",
                    what=what,
                    ranks=["0", str(rank)],
                )
        return [word.payload for word in words]

    def _exchange(self, word: _Word) -> list[_Word]:
        if self._parted:
            raise RankFailed(f"these ranks have parted: {self._parted}; start all processes anew from the last checkpoint")
        said = torch.frombuffer(bytearray(self._encode(word)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._heard(word.what):
            dist.all_gather(sizes, torch.tensor([said.numel()]), group=self._meetings)
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: said.numel()] = said
            heard = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(heard, padded, group=self._meetings)
        parts = (part[: int(size)].numpy().tobytes() for part, size in zip(heard, sizes, strict=True))
        return [msgspec.msgpack.decode(part, type=_Word) for part in parts]

    # --- tensors ---------------------------------------------------------------------------------------------------------

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of rank 0. Ranks give equally many, of equal shapes.

        Raises:
            RankFailed: another rank is not heard of.
        """
        for together in _alike(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in together])
            with self._heard("tensors that follow rank 0"):
                dist.broadcast(flat, src=0)
            _put(together, flat)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with their mean over the ranks, the same one to the bit on all of them.

        Raises:
            RankFailed: another rank is not heard of.
        """
        for together in _alike(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in together])
            with self._heard("gradients to be averaged"):
                dist.all_reduce(flat)
            _put(together, flat.div_(self.size))

    # --- partings --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _heard(self, what: str) -> Iterator[None]:
        """Collectives inside reach every rank."""
        try:
            yield
        except RuntimeError as error:  # all that torch and gloo raise, for a timeout and for a connection that broke
            self._fail(
                f"a rank is not heard of at {what}: {error}",
                "look into the output of the other processes",
                error,
                what=what,
            )

    def _fail(self, why: str, more: str, cause: Exception | None = None, /, **fields: Any) -> NoReturn:  # noqa: ANN401 - an error's
        self._parted = why
        raise RankFailed(f"{why}; {more}", **fields) from cause

    def _disagree(self, why: str, more: str, /, **fields: Any) -> NoReturn:  # noqa: ANN401 - an error's
        self._parted = why
        raise RanksDisagree(f"{why}; {more}", **fields)


def _alike(tensors: Iterable[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """Tensors that can travel as one: of one device and dtype. In the order in which each kind came first."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    yield from kinds.values()


def _put(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    with torch.no_grad():
        for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _differences(said: bytes, otherwise: bytes, rank: int) -> str:
    """Where two encoded values differ, in words."""
    one, other = (dict(_leaves(msgspec.msgpack.decode(value))) for value in (said, otherwise))
    apart = [place for place in {**one, **other} if one.get(place) != other.get(place)]
    told = [
        f"{place + ': ' if place else ''}rank 0 says {one.get(place, 'nothing')}, rank {rank} says {other.get(place, 'nothing')}"
        for place in apart[:MOST_DIFFERENCES]
    ]
    return "; ".join(told) + (f"; and {len(apart) - len(told)} more" if len(apart) > len(told) else "")


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every number and text in a decoded value, by its place."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{place}[{index}]")
    else:
        yield place, repr(value)
