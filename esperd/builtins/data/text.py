"""A text file for language models: every character is a token."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esperd.builtins.data.files import path_of, read, whole_number
from esperd.errors import InvalidData

Pair = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Text:
    """A text as tokens, to be divided into train, gate and audit.

    Args:
        path: for messages.
        tokens: (N,) int64.
        context: T, tokens a sample.
        stride: tokens from one sample of the train part to the next.
    """

    def __init__(self, path: Path, tokens: npt.NDArray[np.int64], context: int, stride: int) -> None:
        self.path = path
        self.tokens = tokens
        self.context = context
        self.stride = stride

    def divided(self, *, gate: float, audit: float) -> dict[str, Pair]:
        """Cut the text into three parts that follow one another (train, gate, audit), and each into windows.

        No window reaches over a border. Windows of gate and audit do not overlap: intervals are over samples that are
        independent of each other.

        Args:
            gate: share of the text.
            audit: share of the text.

        Returns:
            By part, (N, T) tokens and the (N, T) tokens that follow each of them.

        Raises:
            InvalidData: when a part is too short for a single window.
        """
        sizes = {"gate": round(len(self.tokens) * gate), "audit": round(len(self.tokens) * audit)}
        sizes = {"train": len(self.tokens) - sizes["gate"] - sizes["audit"], **sizes}
        parts, start = {}, 0
        for name, size in sizes.items():
            stride = self.stride if name == "train" else self.context
            parts[name] = self._windows(name, self.tokens[start : start + size], stride)
            start += size
        return parts

    def _windows(self, name: str, tokens: npt.NDArray[np.int64], stride: int) -> Pair:
        if len(tokens) <= self.context:
            raise InvalidData(
                f"the {name} part of {self.path} has {len(tokens)} characters; one sample needs {self.context + 1}, context and "
                "the character after it: shorten context, or give a longer text",
                path=str(self.path),
                split=name,
            )
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.context + 1)[::stride]  # (N, T + 1)
        return windows[:, :-1], windows[:, 1:]


def text(path: str, context: int = 64, stride: int | None = None, vocabulary: str | None = None) -> Text:
    """Read a UTF-8 text file as tokens, one for each character; a byte order mark at its beginning is none of them.

    Args:
        path: of the file.
        context: T, characters a sample.
        stride: characters from one sample of the train part to the next; by default ``context``: no character is read twice
            in an epoch.
        vocabulary: the characters that exist, in the order of their tokens; by default those of the whole file, sorted.

    Returns:
        The text, which ``[split]`` divides by place: first train, then gate, then audit.

    Raises:
        InvalidData: when the file cannot be read, is no UTF-8, is empty or holds a character outside of the vocabulary; or an
            option is wrong.
    """
    file = path_of("text", "path", path)
    context = whole_number("text", "context", context)
    stride = context if stride is None else whole_number("text", "stride", stride)
    data = read(file)
    try:
        characters = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        place = len(data) - len(error.object) + error.start
        raise InvalidData(f"{file} is not UTF-8 text: byte {place} is {data[place]:#04x}", path=path) from error
    points = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)  # (N,) code points
    if len(points) == 0:
        raise InvalidData(f"{file} is empty", path=path)
    if vocabulary is None:
        _, tokens = np.unique(points, return_inverse=True)
    else:
        tokens = _tokens(file, points, vocabulary)
    return Text(file, tokens.astype(np.int64), context, stride)


def _tokens(file: Path, points: npt.NDArray[np.uint32], vocabulary: object) -> npt.NDArray[np.int64]:
    """The place in the vocabulary of each code point (N,)."""
    if not isinstance(vocabulary, str) or not vocabulary or len(set(vocabulary)) != len(vocabulary):
        raise InvalidData(
            f"option 'vocabulary' of data 'text' must be the different characters that exist, not {vocabulary!r}",
            key="data_options",
            option="vocabulary",
        )
    try:
        known = np.frombuffer(vocabulary.encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError as error:
        raise InvalidData(
            f"option 'vocabulary' of data 'text' holds half a character, {vocabulary[error.start]!r} at place {error.start}: a "
            f"surrogate, which cannot stand in {file} or any other UTF-8 text",
            key="data_options",
            option="vocabulary",
        ) from error
    order = np.argsort(known)
    found = order[np.minimum(np.searchsorted(known, points, sorter=order), len(known) - 1)]
    foreign = known[found] != points
    if foreign.any():
        place = int(foreign.argmax())
        raise InvalidData(
            f"character {chr(int(points[place]))!r} at place {place} of {file} is not in the vocabulary of {len(known)}",
            path=str(file),
            place=place,
        )
    return found
