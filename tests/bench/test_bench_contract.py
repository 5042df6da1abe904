"""What every bench promises: a ratio is value over baseline, and one that leaves its recorded spread is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import check
import harness


def figure(values=(1.0, 1.2, 1.1), baseline=(1.0, 0.9, 1.1), name="job/bare_wall"):
    return harness.median_figure(name, values, unit="s", better="lower", against="bare", baseline=baseline)


def results(*figures):
    return harness.results("overhead", figures, quick=True, settings={"epochs": 2})


STOPPED = """
import sys, time
sys.path.append({bench!r})
import harness
harness.arguments("A bench that takes long", repeats=1, quick_repeats=1)
try:
    print("began", flush=True)
    time.sleep(600)
finally:
    print("unwound", flush=True)
"""


def test_a_bench_that_is_terminated_takes_with_it_what_it_started():
    program = STOPPED.format(bench=str(Path(harness.__file__).parent))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "began\n"
        bench.terminate()
        told, error = bench.communicate(timeout=60)
    assert told == "unwound\n"
    assert "stopped by SIGTERM" in error


def test_the_ratio_is_the_median_over_the_baselines_median_and_all_repeats_are_kept():
    measured = figure()
    assert (measured.value, measured.baseline.value, measured.ratio) == (1.1, 1.0, 1.1)
    assert measured.repeats == (1.0, 1.2, 1.1)
    assert measured.baseline.repeats == (1.0, 0.9, 1.1)


def test_results_come_back_from_their_file(tmp_path):
    found = results(figure())
    harness.write(found, tmp_path / "new" / "overhead.json")
    assert harness.read(tmp_path / "new" / "overhead.json") == found


def test_results_say_where_they_were_measured():
    found = results(figure())
    assert found.machine["cores"] >= 1
    assert found.versions["torch"] is not None
    assert len(found.commit.removesuffix("-dirty")) == 40 or found.commit.startswith("unknown")


def test_the_table_names_every_figure_with_its_ratio():
    told = harness.table(results(figure(), figure(name="other", values=(3.0,))))
    assert "job/bare_wall" in told
    assert "1.1000" in told
    assert "3.0000" in told


def test_a_spread_holds_what_was_seen_and_a_margin_on_either_side():
    recorded = check.spread([1.0, 1.1, 1.2])
    assert (recorded.low, recorded.high, recorded.seen) == (0.9, 1.3, (1.0, 1.1, 1.2))
    narrow = check.spread([1.0, 1.0, 1.0])
    assert (narrow.low, narrow.high) == (0.95, 1.05)


@pytest.mark.parametrize(("ratio", "told"), [(1.0, False), (0.94, True), (1.06, True)])
def test_a_ratio_outside_its_spread_is_told(ratio, told):
    spreads = {"job/bare_wall": check.spread([1.0, 1.0, 1.0])}
    assert bool(check.problems(results(figure(values=(ratio,), baseline=(1.0,))), spreads)) is told


def test_a_figure_that_is_missing_on_either_side_is_told():
    spreads = {"gone": check.spread([1.0, 1.0, 1.0])}
    first, second = check.problems(results(figure()), spreads)
    assert "no spread is recorded" in first
    assert second == "overhead gone: was not measured"


def test_every_bench_has_its_results_and_its_spread():
    import msgspec

    recorded = msgspec.json.decode(check.BASELINE.read_bytes(), type=check.Recorded)
    for bench in check.BENCHES:
        full = harness.read(check.BASELINE.with_name(f"{bench}.json"))
        assert not full.quick
        assert {figure.name for figure in full.figures} == set(recorded.spreads[bench])
