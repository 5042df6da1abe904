"""The model card's file: its name, and how to tell esperd's from the user's own."""

from __future__ import annotations

from pathlib import Path

CARD = "README.md"

MARK = "<!-- Written by esperd. Delete this line to make this file yours: esperd then leaves it alone. -->"


def is_users_own(card: Path) -> bool:
    """Whether a file stands there that is not, or no longer, a card that esperd may replace."""
    return card.exists() and MARK.encode() not in card.read_bytes()
