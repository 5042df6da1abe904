"""The bench that injects faults: its short form over single parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "bench/recovery.py", "--quick", "--part", "disk", "--part", "bits", "--part", "line"]


def test_the_short_form_recovers_from_every_fault_on_a_part_and_loses_nothing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(COMMAND, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout
    for kind in ("disk: n-th call fails", "bit turned in a blob", "line: "):
        assert kind in told
    rows = {row.split()[0]: float(row.split()[1]) for row in told.splitlines() if "/" in row.split(" ")[0]}
    assert rows == {"recovered/share": 1.0, "lost/acknowledged": 0.0, "wrong/results": 0.0}
