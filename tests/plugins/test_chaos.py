"""The tests of the chaos plugin, which is not installed here: they are those in its own folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "plugins" / "esperd-chaos"
sys.path.append(str(CHAOS / "src"))

_spec = importlib.util.spec_from_file_location("chaos_tests", CHAOS / "tests" / "test_chaos.py")
assert _spec is not None and _spec.loader is not None  # noqa: PT018 - for the type checker
_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tests)
globals().update({name: test for name, test in vars(_tests).items() if name.startswith("test_")})
