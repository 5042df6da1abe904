"""CIFAR-10 and CIFAR-100 in their binary versions; see https://www.cs.toronto.edu/~kriz/cifar.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esperd.builtins.data.files import path_of, read
from esperd.errors import InvalidData

IMAGE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32

Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Version:
    """One of the two data sets."""

    name: str
    train: tuple[str, ...]
    test: str
    classes: dict[str, int]
    """Each label byte before an image → classes it tells apart, in order."""
    pickled: str
    """The file by which its python version is known."""


VERSIONS = (
    Version("CIFAR-10", tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin", {"fine": 10}, "data_batch_1"),
    Version("CIFAR-100", ("train.bin",), "test.bin", {"coarse": 20, "fine": 100}, "train"),
)


def cifar(path: str, labels: str = "fine") -> dict[str, Pair]:
    """Read CIFAR-10 or CIFAR-100 from the folder of its binary version.

    Args:
        path: the folder, ``cifar-10-batches-bin`` or ``cifar-100-binary``.
        labels: ``fine``, or, for CIFAR-100, ``coarse``: 20 superclasses.

    Returns:
        Splits train and audit (the test batch): images (N, 3, 32, 32) uint8 and labels (N,). Gate is taken from train.

    Raises:
        InvalidData: when the folder is the pickled version or none of CIFAR, a file is missing, truncated or malformed, or
            there are no such labels.
    """
    folder = path_of("cifar", "path", path)
    version = _version(folder)
    if labels not in tuple(version.classes):  # a list of the job file has no hash
        known = " or ".join(sorted(version.classes))
        raise InvalidData(
            f"option 'labels' of data 'cifar' must be {known} for {version.name} in {folder}, not {labels!r}",
            key="data_options",
            option="labels",
        )
    batches = [_read(folder / name, version, labels) for name in version.train]
    train = np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
    return {"train": train, "audit": _read(folder / version.test, version, labels)}


def _version(folder: Path) -> Version:
    for version in VERSIONS:
        files = (*version.train, version.test)
        missing = [name for name in files if not (folder / name).is_file()]
        if not missing:
            return version
        if len(missing) < len(files):
            raise InvalidData(f"{folder} lacks {', '.join(missing)} of the binary version of {version.name}", path=str(folder))
        if (folder / version.pickled).is_file():
            raise InvalidData(
                f"{folder} holds the python version of {version.name}, which is pickled: reading it can run code that is in it. "
                'Get the binary version ("suitable for C programs") from https://www.cs.toronto.edu/~kriz/cifar.html',
                path=str(folder),
            )
    what = (
        "is a file, not a folder; unpack it" if folder.is_file() else "is no folder of CIFAR-10's or CIFAR-100's binary version"
    )
    raise InvalidData(f"{folder} {what}", path=str(folder))


def _read(path: Path, version: Version, labels: str) -> Pair:
    """Records of label bytes and 3,072 pixels: red, green and blue planes, row by row."""
    data = np.frombuffer(read(path), dtype=np.uint8)
    size = len(version.classes) + IMAGE_BYTES
    if len(data) == 0 or len(data) % size:
        raise InvalidData(
            f"{path} has {len(data):,} bytes, not a multiple of {size:,} (one image of {version.name}); it is truncated or of "
            "another kind",
            path=str(path),
        )
    records = data.reshape(-1, size)
    for place, (name, classes) in enumerate(version.classes.items()):
        wrong = records[:, place] >= classes
        if wrong.any():
            row = int(wrong.argmax())
            raise InvalidData(
                f"{path} holds the {name} label {records[row, place]} in record {row}; {version.name} has {classes} of them",
                path=str(path),
                row=row,
            )
    images = records[:, len(version.classes) :].reshape(-1, *IMAGE)
    return images, records[:, list(version.classes).index(labels)].astype(np.int64)
