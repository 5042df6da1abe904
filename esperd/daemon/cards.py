"""GPUs, each for itself: what the driver tells of them, which of them jobs may use, and how much of each is left.

The daemon imports no torch: ``nvidia-smi`` is asked. A job is given one card by its UUID, since numbers mean one thing to the
driver (the order on the bus) and another to CUDA (the fastest first).
"""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from esperd.messages.base import Value

VISIBLE = "CUDA_VISIBLE_DEVICES"
QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "mig.mode.current")
PROBE_TIMEOUT_S = 5.0
"""For ``nvidia-smi``; chosen, not measured."""
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU. None: the driver does not tell, so nothing is refused for it."""

    uuid: str
    """As ``CUDA_VISIBLE_DEVICES`` takes it. Empty: a card of which only its memory is known, from the configuration."""
    index: int | None = None
    """On the bus, as ``nvidia-smi`` counts."""
    name: str = ""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    """When it was last looked at."""
    others_bytes: int = 0
    """Held by others than this daemon's jobs, as seen when last no job of ours was on it."""

    def __str__(self) -> str:
        place = "GPU" if self.index is None else f"GPU {self.index}"
        return f"{place} ({self.name})" if self.name else place


class CardStatus(Value, frozen=True, kw_only=True):
    """A GPU, for people. None: not known."""

    uuid: str
    index: int | None
    name: str
    memory_bytes: int | None
    free_bytes: int | None
    jobs: tuple[str, ...]
    """Whose workers were given it."""


def read_cards(told: str) -> tuple[Card, ...]:
    """What ``nvidia-smi`` says to :data:`QUERY`, as CSV without header and units.

    A card that is divided (MIG) tells the memory of the whole, of which a job gets a part: it counts as not known.

    Raises:
        ValueError: a line is of another form.
    """
    cards = []
    for row in csv.reader(told.splitlines(), skipinitialspace=True):
        if not row:
            continue
        index, uuid, name, total, free, mig = row
        divided = mig.strip() == "Enabled"
        cards.append(
            Card(
                uuid=uuid.strip(),
                index=int(index),
                name=name.strip(),
                memory_bytes=None if divided else _bytes(total),
                free_bytes=None if divided else _bytes(free),
            )
        )
    return tuple(cards)


def _bytes(mib: str) -> int | None:
    text = mib.strip()
    return int(text) * MIB if text.isdigit() else None  # "[N/A]", where memory is the machine's own


def visible(cards: Sequence[Card], variable: str | None) -> tuple[Card, ...]:
    """The cards that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; numbers are those of ``nvidia-smi``.

    Args:
        cards: all there are.
        variable: its value; None: not set, so all. As in CUDA, the first entry that names no card ends the list. Parts of a
            card (``MIG-…``) are cards of which nothing is known.
    """
    if variable is None:
        return tuple(cards)
    chosen: list[Card] = []
    for entry in (part.strip() for part in variable.split(",")):
        card = next((card for card in cards if _names(entry, card)), None)
        if card is None and entry.startswith("MIG-"):
            card = Card(uuid=entry)
        if card is None or card in chosen:
            break
        chosen.append(card)
    return tuple(chosen)


def _names(entry: str, card: Card) -> bool:
    if entry.isdigit():
        return card.index == int(entry)
    return entry.startswith("GPU-") and card.uuid.startswith(entry)  # CUDA takes the beginning of a UUID


def looked_again(before: Sequence[Card], now: Sequence[Card], busy: Collection[str]) -> tuple[Card, ...]:
    """The cards at a new look.

    Args:
        before: as at the last one.
        now: as the driver tells.
        busy: UUIDs of those that jobs of ours are on: what others hold there cannot be told from what ours do.
    """
    others = {card.uuid: card.others_bytes for card in before}
    return tuple(replace(card, others_bytes=others.get(card.uuid, 0) if card.uuid in busy else _held(card)) for card in now)


def _held(card: Card) -> int:
    if card.memory_bytes is None or card.free_bytes is None:
        return 0
    return max(0, card.memory_bytes - card.free_bytes)


def ask_driver() -> tuple[Card, ...]:
    """The cards that jobs may use now; none where no driver answers. Takes its time."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        ).stdout
        return visible(read_cards(told), os.environ.get(VISIBLE))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
