"""Files in the idx format, as MNIST and its relatives come in: a header of big-endian sizes, then the numbers."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esperd.builtins.data.files import path_of, read
from esperd.errors import InvalidData

KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""The third byte of a file → its numbers, big-endian."""
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 4
DIMENSION_BYTES = 4
MOST_DIMENSIONS = 32
"""That an array can have in every numpy: 64 from numpy 2 on, 32 before."""

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def idx(images: str, labels: str, test_images: str | None = None, test_labels: str | None = None) -> Pair | dict[str, Pair]:
    """Read images and labels from idx files, packed by gzip or not.

    Args:
        images: path of a file of (N, …) numbers; bytes are pixels.
        labels: path of a file of (N,) whole numbers.
        test_images: path of the images to judge by; they become the audit split.
        test_labels: path of their labels.

    Returns:
        One set, to be divided by ``[split]``; with test files the splits train and audit, and gate is taken from train.

    Raises:
        InvalidData: when a file cannot be read, is malformed, truncated or longer than it says, or images and labels do not
            fit each other.
    """
    train = _pair(("images", images), ("labels", labels))
    if test_images is None and test_labels is None:
        return train
    return {"train": train, "audit": _pair(("test_images", test_images), ("test_labels", test_labels))}


def _pair(images: tuple[str, object], labels: tuple[str, object]) -> Pair:
    x_file, y_file = path_of("idx", *images), path_of("idx", *labels)
    x, y = read_idx(x_file), read_idx(y_file)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InvalidData(f"{y_file} holds {y.dtype} numbers of shape {y.shape}, not one label a sample", path=str(y_file))
    if len(x) != len(y):
        raise InvalidData(f"{x_file} holds {len(x)} samples and {y_file} {len(y)} labels", path=str(y_file))
    return x, y


def read_idx(path: Path) -> npt.NDArray[Any]:
    """The numbers of one idx file, big-endian as they are.

    Raises:
        InvalidData: when it cannot be read, or is not what its header says.
    """
    data = _unpacked(path, read(path))
    if len(data) < HEADER_BYTES or data[:2] != b"\0\0" or data[2] not in KINDS or data[3] == 0:
        raise InvalidData(
            f"{path} is no idx file: it begins with {data[:HEADER_BYTES].hex(' ') or 'nothing'}, not with 00 00, a kind of "
            "number and a number of dimensions",
            path=str(path),
        )
    kind, dimensions = np.dtype(KINDS[data[2]]), data[3]
    if dimensions > MOST_DIMENSIONS:
        raise InvalidData(
            f"{path} says it has {dimensions} dimensions; at most {MOST_DIMENSIONS} can be read: is it an idx file?",
            path=str(path),
            dimensions=dimensions,
        )
    start = HEADER_BYTES + DIMENSION_BYTES * dimensions
    if len(data) < start:
        raise InvalidData(f"{path} ends within its header: it is truncated", path=str(path))
    shape = struct.unpack(f">{dimensions}I", data[HEADER_BYTES:start])
    told, found = math.prod(shape) * kind.itemsize, len(data) - start
    if told != found:
        raise InvalidData(
            f"{path} says it holds {shape} numbers of {kind.itemsize} bytes, {told:,} bytes, but {found:,} follow its header; it "
            f"is {'truncated' if found < told else 'longer than it should be'}",
            path=str(path),
            told=told,
            found=found,
        )
    return np.frombuffer(data, dtype=kind, offset=start).reshape(shape)


def _unpacked(path: Path, data: bytes) -> bytes:
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise InvalidData(f"{path} cannot be unpacked: {error}", path=str(path)) from error
