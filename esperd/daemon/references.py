"""Which files the rows of a state directory refer to: what must be in a backup, and what garbage is not."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from esperd.messages.kernels import KernelManifest

ARTIFACTS = "SELECT job AS owner, name, sha256 FROM artifacts"
CHECKPOINTS = """
    SELECT id AS owner, 'checkpoint' AS name, checkpoint AS sha256 FROM jobs WHERE checkpoint IS NOT NULL
    UNION ALL SELECT id, 'previous checkpoint', previous_checkpoint FROM jobs WHERE previous_checkpoint IS NOT NULL
"""
KERNELS = "SELECT manifest_id, manifest FROM kernels"


class Reference(NamedTuple):
    """A row that names a file."""

    owner: str
    """A job, or the manifest of a kernel."""
    name: str
    sha256: str


def of_rows(rows: Iterable[sqlite3.Row]) -> list[Reference]:
    """What the rows of :data:`ARTIFACTS` or :data:`CHECKPOINTS` name."""
    return [Reference(row["owner"], row["name"], row["sha256"]) for row in rows]


def of_kernels(rows: Iterable[sqlite3.Row]) -> list[Reference]:
    """What the rows of :data:`KERNELS` name. One that cannot be read names nothing: the cache will not use it either."""
    found = []
    for row in rows:
        try:
            manifest = msgspec.json.decode(row["manifest"], type=KernelManifest)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
        found += [
            Reference(row["manifest_id"], "graph", manifest.graph_sha256),
            Reference(row["manifest_id"], "weights", manifest.weights_sha256),
        ]
    return found
