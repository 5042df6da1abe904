"""Finds the commands that a document tells its reader to type: in blocks of code, and in code spans of prose and tables."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

OURS = ("esper", "esperd")
OF_THE_MACHINE = ("systemctl", "journalctl", "loginctl", "kill", "curl", "df", "dmesg")
"""Programs that the documents use besides ours. A line of a block that begins with any other is an error."""


class Command(NamedTuple):
    """What a reader would type."""

    file: str
    variables: tuple[str, ...]
    """Assignments before the program's name."""
    words: tuple[str, ...]
    """The program and its arguments, placeholders as they stand there."""

    def __str__(self) -> str:
        return f"{self.file}: {' '.join((*self.variables, *self.words))}"


def commands_of(file: Path) -> list[Command]:
    """Every command of a document, once, in order.

    Raises:
        ValueError: a block holds a line that is neither a command nor part of a configuration.
    """
    text = file.read_text(encoding="utf-8")
    blocks, prose = _parted(text)
    found: dict[Command, None] = {}
    for block in blocks:
        if _is_configuration(block):
            continue
        for line in filter(None, map(str.strip, block.splitlines())):
            command = _command(file.name, line)
            if command is None:
                raise ValueError(f"{file.name}: {line!r} is no command of {', '.join((*OURS, *OF_THE_MACHINE))}, and no TOML")
            found[command] = None
    for span in re.findall(r"`([^`]+)`", prose):
        command = _command(file.name, " ".join(span.split()))
        if command is not None and len(command.words) > 1:  # the bare name of a program is no command
            found[command] = None
    return list(found)


def _parted(text: str) -> tuple[list[str], str]:
    """Blocks of code, and the rest."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = r"(?<=\n\n)(?:    [^\n]*\n|\n(?=    ))+"
    blocks += re.findall(indented, text)
    return blocks, re.sub(indented, "", text)


def _is_configuration(block: str) -> bool:
    try:
        tomllib.loads("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    except tomllib.TOMLDecodeError:
        return False
    return True


def _command(file: str, line: str) -> Command | None:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: prose
        return None
    named = next((place for place, word in enumerate(words) if not re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", word)), len(words))
    if words[named : named + 1] and words[named] in (*OURS, *OF_THE_MACHINE):
        return Command(file, tuple(words[:named]), tuple(words[named:]))
    return None
