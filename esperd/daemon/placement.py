"""Whether a job fits on the machine beside those that run: pure; what it does not know it holds against nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from esperd.config import Resources
from esperd.daemon.cards import Card
from esperd.daemon.machine import Machine, Moment
from esperd.messages.jobs import Job

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a job takes while it runs. None: not known."""

    memory_bytes: int | None
    cores: int
    gpu_memory_bytes: int | None
    """Of one card."""
    on_gpu: bool = False
    card: str | None = None
    """UUID of the card it was given; None: none, or not yet."""


NOT_KNOWN = Need(memory_bytes=None, cores=1, gpu_memory_bytes=None)
"""Of a job that nobody has looked at."""


UNSEEN = Moment()
"""Nobody has looked at what the machine has left."""


class Placed(NamedTuple):
    """Whether a job may start, and where."""

    lacks: str
    """What it waits for; empty when it fits."""
    card: Card | None = None
    """The GPU it gets; None: it needs none, or nobody knows of any."""


def allowance(machine: Machine, configured: Resources) -> Machine:
    """What jobs may use together, and of each card: as configured, else all that the machine has.

    A card that no driver tells of is one nevertheless where the configuration says how much memory it has.
    """
    limit = configured.gpu_memory_bytes
    cards = machine.cards
    if limit:
        cards = tuple(replace(card, memory_bytes=min(card.memory_bytes or limit, limit)) for card in cards) or (
            Card(uuid="", memory_bytes=limit),
        )
    return Machine(
        memory_bytes=configured.memory_bytes or machine.memory_bytes,
        cores=configured.cores or machine.cores,
        cards=cards,
    )


def need(job: Job, peak_memory_bytes: int | None = None, peak_gpu_bytes: int | None = None) -> Need:
    """What a job takes: what it declares, else what such a job was measured to take.

    Args:
        job: as submitted.
        peak_memory_bytes: of an earlier attempt, or of a job like it; None: never measured.
        peak_gpu_bytes: likewise.
    """
    on_gpu = job.device == "cuda"
    return Need(
        memory_bytes=job.resources.memory_bytes or peak_memory_bytes,
        cores=job.threads,
        gpu_memory_bytes=(job.resources.gpu_memory_bytes or peak_gpu_bytes) if on_gpu else None,
        on_gpu=on_gpu,
    )


DRIVERS_SHARE = 0.02
"""Of a card's memory the driver keeps at most so much for itself: 480 of 81,559 MiB on an H100. Chosen above that."""


def never_fits(wanted: Need, room: Machine) -> str:
    """Why a job could not even run alone; empty when it could."""
    if lacks := _lacking(wanted, [], room):
        return lacks
    wants, largest = wanted.gpu_memory_bytes, _largest(room.cards)
    if wants is not None and largest is not None and wants > largest:
        return f"GPU memory: it takes {_gib(wants)}, the largest card has {_gib(largest)}"
    return ""


def placed(wanted: Need, running: Iterable[Need], room: Machine, now: Moment = UNSEEN, max_load: float = 0.0) -> Placed:
    """Where a job goes beside those that run, or what it waits for. Alone, what was measured does not keep it from a try.

    Of the cards it fits on, one with the fewest jobs; among these, one with the most memory left.

    Args:
        wanted: by the job.
        running: what is set aside for others.
        room: what jobs may use together.
        now: what the machine has left, other programs counted.
        max_load: no second job starts from this load on; 0: it is not looked at.
    """
    held = list(running)
    if held and (lacks := _lacking(wanted, held, room) or _short(wanted, now, max_load)):
        return Placed(lacks)
    if not wanted.on_gpu or not room.cards:
        return Placed("")
    wants = wanted.gpu_memory_bytes
    left = {card.uuid: _left(card, held) for card in room.cards}
    fitting = [card for card in room.cards if wants is None or left[card.uuid] is None or wants <= (left[card.uuid] or 0)]
    if not fitting:
        largest = _largest(room.cards)
        if not held and wants is not None and largest is not None and wants > largest:  # measured: a declared one was refused
            fitting = list(room.cards)
        else:
            return Placed(f"GPU memory: it takes {_gib(wants)}; left: {_told(room.cards, left)}")
    on = {card.uuid: sum(each.card == card.uuid for each in held) for card in fitting}
    return Placed("", min(fitting, key=lambda card: (on[card.uuid], -(left[card.uuid] or 0))))


def _left(card: Card, held: list[Need]) -> int | None:
    """Memory of a card that nobody holds and that is set aside for nobody; None: not known."""
    if card.memory_bytes is None:
        return None
    promised = sum(each.gpu_memory_bytes or 0 for each in held if each.card == card.uuid)
    left = card.memory_bytes - card.others_bytes - promised
    if card.free_bytes is not None:
        left = min(left, card.free_bytes)
    if not any(each.card == card.uuid for each in held) and left >= (1 - DRIVERS_SHARE) * card.memory_bytes:
        return card.memory_bytes  # nobody is on it: a job that takes what the card is said to have is to be tried, not to wait
    return max(0, left)


def _largest(cards: Sequence[Card]) -> int | None:
    """Memory of the largest card; None: where one is not known, or there is none."""
    sizes = [card.memory_bytes for card in cards]
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def _told(cards: Sequence[Card], left: Mapping[str, int | None]) -> str:
    return ", ".join(f"{card} {_gib(left[card.uuid])} of {_gib(card.memory_bytes)}" for card in cards)


def _lacking(wanted: Need, held: list[Need], room: Machine) -> str:
    """Of what the machine has as a whole."""
    cores = sum(each.cores for each in held)
    if wanted.cores + cores > max(room.cores, 1.0):
        return f"cores: it takes {wanted.cores}, {_of(cores, held)} of {room.cores:g}"
    wants, has = wanted.memory_bytes, room.memory_bytes
    if wants is None or has is None:
        return ""
    taken = sum(each.memory_bytes or 0 for each in held)
    if wants + taken > has:
        return f"memory: it takes {_gib(wants)}, {_of(_gib(taken), held)} of {_gib(has)}"
    return ""


def _short(wanted: Need, now: Moment, max_load: float) -> str:
    """Of what the machine has left now. What running jobs did not take yet is free here: :func:`_lacking` holds it for them."""
    if wanted.memory_bytes is not None and now.free_bytes is not None and wanted.memory_bytes > now.free_bytes:
        return f"memory: it takes {_gib(wanted.memory_bytes)}, {_gib(now.free_bytes)} are free now, whoever holds the rest"
    if max_load and now.load is not None and now.load >= max_load:
        return f"load: {now.load:.2f}, and resources.max_load is {max_load:g}"
    return ""


def _of(taken: object, held: list[Need]) -> str:
    return f"{len(held)} running jobs take {taken}" if held else "jobs may use none but that much together:"


def _gib(size_bytes: int | None) -> str:
    return "an unknown amount" if size_bytes is None else f"{size_bytes / GIB:.2f} GiB"


def kind_of(job: Job) -> bytes:
    """What decides how much memory a job takes, as far as the daemon can see: alike jobs are expected to take alike."""
    return msgspec.msgpack.encode(
        [job.host, job.host_options, job.data, job.batch_size, job.precision, job.device], order="sorted"
    )
