"""The notebook page runs as it stands, in one process, from its first line to its last."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_notebook_page_runs_and_shows_what_it_says(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "notebook.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 6
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    ran = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stderr
    told = ran.stdout
    assert re.search(r"the host alone: \d+\.\d% of the gate split", told)
    assert "#0 probationary Contribution(" in told
    assert re.search(r"contribution [+-]\d\.\d+, trial [+-]\d\.\d+ \[", told)
    assert "germinated → training" in told
    assert re.search(r"\d+\.\d% of the audit split, \d+ parameters", told)
