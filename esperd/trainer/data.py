"""Data of a job: three disjoint splits, checked before anything is trained.

Train feeds training, gate every decision, audit is read once at the end. Data comes from a registered data set, an ``.npz``
file or a ``module:function``; a function returns one of

- ``{"train": part, "gate": part, "audit": part}``,
- ``{"train": part, "audit": part}``, as data sets with a test set come: the job's ``[split]`` takes gate from train,
- one part, which is divided by the job's ``[split]``,
- an object with a method ``divided(*, gate, audit)`` that takes the shares of ``[split]`` and returns the three: what must not be
  shuffled, as a text or a series in time, divides itself.

A part is a pair ``(x, y)`` of arrays or tensors with one row per sample, or a map-style dataset (length, and an index gives
``(x, y)``) whose samples are fetched when a batch needs them.

A batch is one tensor of inputs and one of targets, whatever the model. Inputs of uint8 are pixels: they become float32 in 0 to
1; (N, H, W, C) with 1, 3 or 4 channels becomes (N, C, H, W), and (N, H, W) becomes (N, 1, H, W). Other floating-point inputs
become float32, whole numbers (token ids) int64.

A sample of one split, input and target, may not stand in another one, unless ``[split]`` allows duplicates. Parts of a text are
disjoint by place; a window that stands in two of them by chance counts as a duplicate all the same, and in short contexts many
do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from esperd.declarations import Dataset
from esperd.errors import InvalidData, InvalidJob
from esperd.growth.interval import SMALLEST_SAMPLE
from esperd.messages.jobs import Job
from esperd.trainer.dataset import DatasetSplit, origin
from esperd.trainer.samples import check_label_range, inputs_from, targets_from
from esperd.trainer.sources import read_source

SPLIT_NAMES = ("train", "gate", "audit")
"""In this order everywhere."""


class Split(Protocol):
    """Samples that can be fetched in any order."""

    @property
    def samples(self) -> int:
        """Number of samples."""

    def __len__(self) -> int: ...

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fetch samples.

        Args:
            indices: (B,) int64, each below ``samples``.

        Returns:
            x (B, …) and y (B, …), on the CPU.
        """

    def check_labels(self, classes: int) -> None:
        """Refuse labels outside 0 to ``classes`` - 1."""


class ArraySplit:
    """Samples held in memory.

    Args:
        name: ``train``, ``gate`` or ``audit``, for messages.
        x: (N, …) inputs.
        y: (N, …) targets.
    """

    def __init__(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.name = name
        self.x = x
        self.y = y

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of x and y: (B, …) and (B, …)."""
        return self.x[indices], self.y[indices]

    def check_labels(self, classes: int) -> None:
        """Refuse labels outside 0 to ``classes`` - 1.

        Raises:
            InvalidData: when a label lies outside; names the first.
        """
        check_label_range(f"the {self.name} split", self.y, classes)


@dataclass(frozen=True)
class Splits:
    """What a job trains, decides and is judged on."""

    train: Split
    gate: Split
    audit: Split
    fingerprint: str | None
    """SHA-256 over every sample of every split held in memory, in order; None when all are fetched on demand."""
    inexact_because: str
    """Why a resumed job may see other samples than an undisturbed one; empty when it sees the same."""


def load_splits(job: Job, datasets: Mapping[str, Dataset]) -> Splits:
    """Load, divide, convert and check the job's data.

    Args:
        job: names the data; its ``workdir`` is on ``sys.path`` already and is where relative paths start.
        datasets: registered data sets by name.

    Raises:
        UnknownName: when no data set has the name.
        ImportFailed: when a loader does not import or raises.
        InvalidData: when what it returns cannot be trained on.
        InvalidJob: when ``[split]`` leaves nothing to train on.
        MissingExtra: when a built-in data set needs a package that is not installed.
    """
    if job.split.gate + job.split.audit >= 1.0:
        raise InvalidJob(
            f"split.gate {job.split.gate} and split.audit {job.split.audit} leave nothing to train on; lower them", key="split"
        )
    parts = _parts(read_source(job, datasets), job)
    missing = [name for name in SPLIT_NAMES if name not in parts]
    unknown = [str(name) for name in parts if name not in SPLIT_NAMES]
    if missing or unknown:
        raise InvalidData(
            f"data {job.data!r} must give exactly the splits train, gate and audit, or train and audit; missing: {missing}, "
            f"unknown: {unknown}",
            missing=missing,
            unknown=unknown,
        )
    train, gate, audit = (_split(name, parts[name], job.loss) for name in SPLIT_NAMES)
    _check_shapes(train, gate, audit)
    _check_origins({name: parts[name] for name in SPLIT_NAMES})
    arrays = [split for split in (train, gate, audit) if isinstance(split, ArraySplit)]
    digests = {split.name: _digests(split) for split in arrays}
    if not job.split.allow_duplicates:
        _check_overlap(digests)
    return Splits(
        train=train,
        gate=gate,
        audit=audit,
        fingerprint=_fingerprint(arrays, digests) if arrays else None,
        inexact_because="" if len(arrays) == len(SPLIT_NAMES) else "samples are fetched from a data set of the user",
    )


def check_labels(splits: Splits, classes: int) -> None:
    """Refuse labels the model has no logit for. For cross_entropy and next_token, once the model's output is known.

    Samples that are fetched on demand are checked as they come.

    Args:
        splits: the job's data.
        classes: K of the model's (B, K, …) logits, or V of (B, T, V).

    Raises:
        InvalidData: when a label lies outside 0 to ``classes`` - 1; names split, row and label.
    """
    for split in (splits.train, splits.gate, splits.audit):
        split.check_labels(classes)


def check_sizes(splits: Splits) -> None:
    """Refuse gate and audit splits that are too small to judge by: contributions and comparisons are intervals over samples.

    Raises:
        InvalidData: when one has fewer samples than an interval needs.
    """
    for name, split in (("gate", splits.gate), ("audit", splits.audit)):
        if split.samples < SMALLEST_SAMPLE:
            raise InvalidData(
                f"the {name} split has {split.samples} samples; an interval needs at least {SMALLEST_SAMPLE}",
                split=name,
                samples=split.samples,
            )


def epoch_order(rng_seed: int, epoch: int, samples: int) -> torch.Tensor:
    """Order in which an epoch visits the train split. Nothing but the arguments decides it: a resumed job finds its place.

    The order is ``torch.randperm(samples)`` of a CPU generator seeded with ``(rng_seed * 1_000_003 + epoch) % 2**32``. The
    modulus is what torch's Mersenne twister uses of a seed; the prime keeps epochs of neighbouring seeds apart.

    Args:
        rng_seed: the job's.
        epoch: counted from 0.
        samples: size of the train split.

    Returns:
        (samples,) int64 permutation.
    """
    generator = torch.Generator().manual_seed((rng_seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(samples, generator=generator)


def _parts(loaded: Any, job: Job) -> Mapping[Any, Any]:  # noqa: ANN401 - whatever the user's function returned
    """By name, whatever names there are: what is given in one part is divided, and a missing gate is taken from train."""
    if not isinstance(loaded, Mapping):
        return _cut(loaded, job, {"audit": job.split.audit, "gate": job.split.gate})
    if set(loaded) == {"train", "audit"}:
        return {**_cut(loaded["train"], job, {"gate": job.split.gate}), "audit": loaded["audit"]}
    return loaded


def _cut(part: Any, job: Job, shares: Mapping[str, float]) -> dict[str, Any]:  # noqa: ANN401 - whatever the user's function returned
    """Take shares of a set, one after the other, from the permutation that ``split.seed`` draws; the rest is train."""
    pair = _pair("the data set", part, job.loss) if isinstance(part, tuple) else None
    samples = len(part) if pair is None else len(pair[0])
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(job.split.seed % 2**32))
    chosen: dict[str, torch.Tensor] = {}
    for name, share in shares.items():
        taken = round(samples * share)
        chosen[name], order = order[:taken], order[taken:]
    chosen["train"] = order
    if pair is None:
        return {name: torch.utils.data.Subset(part, rows.tolist()) for name, rows in chosen.items()}
    return {name: (pair[0][rows], pair[1][rows]) for name, rows in chosen.items()}


def _pair(where: str, part: tuple[Any, Any], loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, …) inputs and (N, …) targets as training needs them.

    Raises:
        InvalidData: when they cannot be converted or their lengths differ.
    """
    x, y = inputs_from(where, part[0]), targets_from(where, part[1], loss)
    if len(x) != len(y):
        raise InvalidData(f"{where} has {len(x)} inputs and {len(y)} targets", where=where, x=len(x), y=len(y))
    return x, y


def _split(name: str, part: Any, loss: str) -> ArraySplit | DatasetSplit:  # noqa: ANN401 - array or tensor pair, or dataset
    if not isinstance(part, tuple):
        return DatasetSplit(name, part, loss)
    return ArraySplit(name, *_pair(f"the {name} split", part, loss))


def _check_shapes(*splits: ArraySplit | DatasetSplit) -> None:
    """Every split must hold the same kind of sample.

    Raises:
        InvalidData: when a split is empty, or shape or dtype of its samples differ from the train split's.
    """
    described = {}
    for split in splits:
        if len(split) == 0:
            raise InvalidData(f"the {split.name} split is empty", split=split.name)
        x, y = split.batch(torch.zeros(1, dtype=torch.int64))
        described[split.name] = f"x {tuple(x.shape[1:])} {x.dtype}, y {tuple(y.shape[1:])} {y.dtype}"
    for name, description in described.items():
        if description != described["train"]:
            raise InvalidData(
                f"samples of the {name} split differ from those of train: {description} against {described['train']}",
                split=name,
            )


def _check_origins(parts: Mapping[str, Any]) -> None:
    """Datasets are compared by identity: the same object, or subsets of one object with rows in common.

    Raises:
        InvalidData: when two splits read the same row of the same dataset.
    """
    seen: dict[str, tuple[int, set[int]]] = {}
    for name, part in parts.items():
        if isinstance(part, tuple):
            continue
        base, rows = origin(part)
        for other, (other_base, other_rows) in seen.items():
            shared = len(rows & other_rows) if base == other_base else 0
            if shared:
                raise InvalidData(
                    f"{shared} rows of the {name} split are also in {other}", split=name, other=other, shared=shared
                )
        seen[name] = (base, rows)


def _digests(split: ArraySplit) -> list[bytes]:
    """One hash per sample, over input and target."""
    x, y = split.x.numpy(), split.y.numpy()
    return [hashlib.blake2b(row.tobytes() + target.tobytes(), digest_size=16).digest() for row, target in zip(x, y, strict=True)]


def _check_overlap(digests: Mapping[str, list[bytes]]) -> None:
    """A sample that is also in another split makes decisions or the audit look better than they are.

    Raises:
        InvalidData: when a sample (input and target) stands in two splits; says how many.
    """
    names = list(digests)
    for position, name in enumerate(names):
        for other in names[:position]:
            known = set(digests[other])
            shared = sum(digest in known for digest in digests[name])
            if shared:
                raise InvalidData(
                    f"{shared} of {len(digests[name])} samples of the {name} split (input and target) are also in {other}; "
                    "remove them, or set allow_duplicates = true under [split] if the data really repeats itself",
                    split=name,
                    other=other,
                    shared=shared,
                )


def _fingerprint(splits: list[ArraySplit], digests: Mapping[str, list[bytes]]) -> str:
    whole = hashlib.sha256()
    for split in splits:
        kind = f"{split.name} {tuple(split.x.shape)} {split.x.dtype} {tuple(split.y.shape)} {split.y.dtype}"
        whole.update(kind.encode() + b"\0" + b"".join(digests[split.name]))
    return whole.hexdigest()
