"""What the benches of growth share: data, a trained host, training for a budget of FLOPs, and lines that are kept.

Everything is drawn from the RNG seed of a run, on one thread, so a line can be made again. Decisions read the gate split;
audit is read once, at the end of an arm. FLOPs are the ledger's: incubation, ablations, trials and culled seeds are charged.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import texts
import torch
from torch.nn import functional

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.builtins.networks.cnn import cnn
from esperd.growth import BlueprintSource, Grower, GrowingNetwork, assemble, find_slots, measure
from esperd.growth.contribution import Measured
from esperd.growth.optimizer import set_learning_rate
from esperd.messages.jobs import Gates, Growth, Optimizer

Batch = tuple[torch.Tensor, torch.Tensor]
OPEN_GATES = Gates(
    min_gradient_ratio=0.0,
    max_vanished_share=1.0,
    max_exploded_share=1.0,
    max_loss_drift=1e9,
    max_loss_spike=1e9,
    min_contribution=-1e9,
)
"""Gates that let everything through: what is compared is how seeds learn, not which are let in."""


@dataclass(frozen=True)
class Data:
    """Images and labels of three splits, normalised by the train split's channels; or characters and those that follow."""

    name: str
    train: Batch
    gate: Batch
    audit: Batch
    channels: tuple[int, ...]
    """Of the host that suits them; none for text."""
    vocabulary: int = 0
    """Characters that exist; 0 for images."""
    slots: tuple[str, ...] = ("features.stage?",)
    """Where that host can grow."""
    drawn: int | None = None
    """Samples that an epoch draws anew; None: all of them, each once."""

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return self.drawn or len(self.train[0])


def load(path: Path | None) -> Data:
    """An ``.npz`` file of uint8 images with three splits, a ``.txt`` file, or scikit-learn's digits."""
    if path is None:
        return _digits()
    if path.suffix == ".txt":
        windows, vocabulary = texts.splits(path)
        return Data(
            path.stem,
            **windows,
            channels=(),
            vocabulary=vocabulary,
            slots=texts.SLOTS,
            drawn=min(texts.EPOCH, len(windows["train"][0])),
        )
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    images = {split: torch.from_numpy(arrays[f"x_{split}"]).permute(0, 3, 1, 2).float() / 255 for split in SPLITS}
    mean, std = images["train"].mean((0, 2, 3), keepdim=True), images["train"].std((0, 2, 3), keepdim=True)
    labels = {split: torch.from_numpy(arrays[f"y_{split}"].astype(np.int64)) for split in SPLITS}
    parts = {split: (((images[split] - mean) / std).contiguous(), labels[split]) for split in SPLITS}
    return Data(path.stem, **parts, channels=(12, 16, 24))


SPLITS = ("train", "gate", "audit")


def on(data: Data, device: str) -> Data:
    """The same samples on a device."""
    return replace(data, **{split: tuple(part.to(device) for part in getattr(data, split)) for split in SPLITS})


def _digits() -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:1077], "gate": order[1077:1437], "audit": order[1437:]}
    return Data("digits", **{split: (x[rows[split]], y[rows[split]]) for split in SPLITS}, channels=(4, 8))


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, K), (B,) → (B,) cross-entropy; (B, T, K), (B, T) → (B,) its mean over the places of a sample."""
    if target.dim() == 2:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)
    return functional.cross_entropy(output, target, reduction="none")


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, K), (B,) → (B,) 1 where the highest logit is the label; (B, T, K), (B, T) → (B,) the share of places where it is."""
    right = (output.argmax(-1) == target).float()
    return right.mean(1) if target.dim() == 2 else right


def batches(split: Batch, size: int, rng_seed: int, most: int | None = None) -> list[Batch]:
    """One pass over a split, or over the first ``most`` samples of it, in the order that the seed gives."""
    order = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(rng_seed))[:most]
    return [(_laid_out(split[0][rows]), split[1][rows]) for rows in torch.split(order, size)]


def in_order(split: Batch, size: int = 500) -> list[Batch]:
    """A split for measuring."""
    return [(_laid_out(x), y) for x, y in zip(torch.split(split[0], size), torch.split(split[1], size), strict=True)]


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Channels last: a step takes two thirds of the time on this processor. Text has none."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@dataclass(frozen=True)
class Phase:
    """How long and how fast a phase of training is."""

    learning_rate: float
    batch_size: int
    warmup_share: float = 0.05

    def rate(self, share: float) -> float:
        """Warm-up, then half a cosine down to 0."""
        if share < self.warmup_share:
            return self.learning_rate * share / self.warmup_share
        rest = min((share - self.warmup_share) / (1 - self.warmup_share), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))


class TrialSamples:
    """The train split without end, and the gate split, for controlled trials."""

    def __init__(self, data: Data, size: int, rng_seed: int) -> None:
        self._data, self._size, self._rng_seed = data, size, rng_seed

    def train(self, epoch: int) -> Iterator[Batch]:
        """Orders that no training epoch has."""
        for number in itertools.count():
            yield from batches(self._data.train, self._size, 900_000 + 1_000 * self._rng_seed + epoch + number)

    def gate(self) -> Iterable[Batch]:
        """The gate split."""
        return in_order(self._data.gate)


def grower_of(
    data: Data,
    host: torch.nn.Module,
    *,
    rng_seed: int,
    batch_size: int,
    growth: Growth | None = None,
    settings: Gates = OPEN_GATES,
    patterns: tuple[str, ...] = (),
    learning_rate: float = 0.1,
) -> Grower:
    """A grower over a host, with every built-in blueprint; the protocol's optimiser."""
    slots = find_slots(host, data.train[0][:4], patterns=patterns)
    return assemble(
        GrowingNetwork(host, slots),
        BlueprintSource(BLUEPRINTS, rng_seed=rng_seed),
        loss=loss,
        metric=accuracy,
        steps_per_epoch=-(-data.epoch_samples // batch_size),
        optimizer=_optimizer(data, learning_rate),
        growth=growth,
        settings=settings,
        batches=TrialSamples(data, batch_size, rng_seed),
    )


def _optimizer(data: Data, learning_rate: float) -> Optimizer:
    if data.vocabulary:
        return texts.optimizer(learning_rate)
    return Optimizer(name="sgd", learning_rate=learning_rate, momentum=0.9, weight_decay=5e-4)


def fresh_host(data: Data, rng_seed: int) -> torch.nn.Module:
    """The host of the protocol, its weights drawn from the seed."""
    torch.manual_seed(rng_seed)
    if data.vocabulary:
        return texts.host(data.vocabulary)
    host = cnn(data.channels, in_channels=data.train[0].shape[1], classes=10)
    return host.to(memory_format=torch.channels_last)


def nothing(_grower: Grower, _measured: Measured) -> None:
    """Decide nothing."""


def train(
    grower: Grower,
    data: Data,
    *,
    flops: float,
    phase: Phase,
    rng_seed: int,
    decide: Callable[[Grower, Measured], None] = nothing,
    losses: list[float] | None = None,
) -> None:
    """Train until the ledger has spent ``flops`` more than it has now. After every epoch the gate split is measured, the epoch's
    mean train loss appended to ``losses``, stages move on and ``decide`` is called.
    """
    begun = grower.ledger.total
    torch.manual_seed(rng_seed)

    def share() -> float:
        return (grower.ledger.total - begun) / flops

    for number in itertools.count():
        grower.network.train()
        means: list[torch.Tensor] = []
        for inputs, targets in batches(data.train, phase.batch_size, 1_000 * rng_seed + number, data.drawn):
            if share() >= 1.0:
                return
            if grower.sample is None:
                grower.sample = (inputs, targets)
            set_learning_rate(grower.optimizer, phase.rate(share()), grower.step)
            means.append(grower.train_step(inputs, targets))
        grower.epoch += 1
        measured = grower.measure(in_order(data.gate))
        if losses is not None:
            losses.append(float(torch.stack(means).mean()))
        grower.end_epoch()
        decide(grower, measured)


def result(grower: Grower, data: Data, seconds: float) -> dict[str, object]:
    """What an arm ended with. The audit split is read here, once."""
    gate, audit = (measure(grower.network, in_order(split), loss, accuracy) for split in (data.gate, data.audit))
    return {
        "gate_accuracy": gate.mean_metric,
        "gate_loss": gate.mean_loss,
        "audit_accuracy": audit.mean_metric,
        "audit_loss": audit.mean_loss,
        "parameters": grower.network.effective_parameters,
        "flops": {purpose: spent for purpose, spent in grower.ledger.spent.items() if spent},
        "epochs": grower.epoch,
        "seconds": round(seconds, 2),
    }


def clock() -> float:
    """Seconds of this process's own work: other programs do not count."""
    return time.process_time()


class Lines:
    """One JSON line a run, appended as it ends; a run whose line stands there for this protocol is not run again."""

    def __init__(self, path: Path, protocol: dict[str, object], *, keep: bool) -> None:
        self.digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        self.protocol = protocol
        self._path = path
        self._keep = keep
        self.lines: list[dict] = []
        if keep and path.exists():
            known = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
            self.lines = [line for line in known if line["protocol"] == self.digest]

    def has(self, **key: object) -> bool:
        """Whether this run is known."""
        return any(all(line.get(name) == value for name, value in key.items()) for line in self.lines)

    def add(self, line: dict[str, object]) -> None:
        """Keep a run."""
        line = {"protocol": self.digest, **line}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self._keep:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def of(self, **key: object) -> list[dict]:
        """Lines with these values."""
        return [line for line in self.lines if all(line.get(name) == value for name, value in key.items())]
