"""The bench that injects faults: its short form over single parts, clients and keys; with ``-m slow``, over daemons as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAEMONS = pytest.param(
    ("daemon", "poison"),
    ("daemon: kill_trainer", "daemon: kill_daemon", "poison: "),
    marks=[pytest.mark.slow, pytest.mark.timeout(900)],  # each job of theirs starts workers
)


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        (("disk", "bits", "line"), ("disk: n-th call fails", "bit turned in a blob", "line: ")),
        (("power", "clients", "keys"), ("power: kill -9", "50 clients at once", "key: revoked", "key: garbage")),
        DAEMONS,
    ],
)
def test_the_short_form_recovers_from_every_fault_and_loses_nothing(parts, kinds):
    command = [sys.executable, "bench/recovery.py", "--quick", *(word for part in parts for word in ("--part", part))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [kind for kind in kinds if kind not in done.stdout] == []
    rows = {row.split()[0]: float(row.split()[1]) for row in done.stdout.splitlines() if "/" in row.split(" ")[0]}
    assert (rows["recovered/share"], rows["lost/acknowledged"], rows["wrong/results"]) == (1.0, 0.0, 0.0)
    assert rows.get("leaked/resources", 0.0) == 0.0
