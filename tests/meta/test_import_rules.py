"""Who may import whom: the contracts of pyproject.toml hold, they would notice, and at run time torch stays where it belongs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]


def lint(folder):
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "500"}
    return subprocess.run(LINT_IMPORTS, check=False, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_import_rules_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


BREACHES = {
    "policy/learned": "import torch",
    "daemon/late": "def later():\n    import esperd.growth.slots",  # torch, indirectly and lazily
    "growth/remote": "import esperd.config",
    "growth/acting": "import esperd.actors.actor",
    "actors/nets": "import esperd.declarations",
    "store/aware": "import esperd.messages.jobs",
    "messages/rich": "import esperd.errors",
    "execution/configured": "import esperd.logs",
    "telemetry/deep": "import esperd.execution.graph",
    "cache/policed": "import esperd.policy.rent",
    "trainer/files": "import esperd.jobfile",
    "cli/short_cut": "import esperd.builtins.hosts",
    "builtins/far": "import esperd.store.blobs",
}


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "esperd", tmp_path / "esperd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_rules_notice_what_breaks_them(copy):
    for module, code in BREACHES.items():
        (copy / "esperd" / f"{module}.py").write_text(f"{code}\n")
    done = lint(copy)
    assert done.returncode == 1
    unnoticed = [module for module in BREACHES if f"esperd.{module.replace('/', '.')} ->" not in done.stdout]
    assert unnoticed == []


def test_a_room_that_was_given_no_place_is_noticed(copy):
    (copy / "esperd" / "attic.py").touch()
    done = lint(copy)
    assert done.returncode == 1
    assert "- esperd.attic" in done.stdout


LIGHT = """
import importlib, pathlib, sys
import esperd
from esperd.plugins import load_plugins
folder = pathlib.Path(esperd.__file__).parent
heavy = ("trainer", "compiler", "growth", "execution", "builtins/networks", "builtins/seeds", "builtins/data")
files = {file.relative_to(folder) for file in folder.rglob("*.py") if file.name not in ("__init__.py", "__main__.py")}
light = {file for file in files if not any(file.is_relative_to(room) for room in heavy)} | {pathlib.Path("compiler/keys.py")}
for file in sorted(light):
    importlib.import_module(".".join(["esperd", *file.with_suffix("").parts]))
    if "torch" in sys.modules:
        sys.exit(f"{file} imports torch")
assert len(light) > 80, light
load_plugins()
sys.exit("torch" in sys.modules)
"""


def test_everything_but_the_workers_rooms_imports_without_torch():
    done = subprocess.run([sys.executable, "-c", LIGHT], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
