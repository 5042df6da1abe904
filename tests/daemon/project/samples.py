"""Data of a user: three clouds of points, once in splits that overlap."""

from __future__ import annotations

import threading

import numpy as np

Part = tuple[np.ndarray, np.ndarray]


def clouds(seed: int = 0, count: int = 480) -> Part:
    """Three classes of (12,) points around random centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, 12))
    y = rng.integers(0, 3, size=count)
    x = centres[y] + rng.normal(size=(count, 12)) * 1.2
    return x.astype(np.float32), y


def never() -> Part:
    """Of a loader that waits for something that does not come."""
    threading.Event().wait()
    return clouds()


def overlapping() -> dict[str, Part]:
    """The audit split holds samples of the train split."""
    x, y = clouds()
    return {"train": (x[:300], y[:300]), "gate": (x[300:400], y[300:400]), "audit": (x[250:300], y[250:300])}
