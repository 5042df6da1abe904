"""The bench that asks whether growing pays: its statistics, what counts as known, and its short form from end to end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import growth  # noqa: E402 - found where the line above says
import growth_figures  # noqa: E402
import growth_plan  # noqa: E402
import growth_plots  # noqa: E402
import harness  # noqa: E402
import lab  # noqa: E402

HERE = harness.machine()["cpu"]
PLAN = {**growth_plan.FULL, "arms": ("a", "b", "c")}


@pytest.fixture
def lines(tmp_path):
    return lab.Lines(tmp_path / "growth.jsonl", {"plan": PLAN}, keep=False)


def line(arm, rng_seed=0, part="h1", *, audit=0.6, gate=0.6, processor=HERE, **fields):
    return {
        "part": part,
        "rng_seed": rng_seed,
        "arm": arm,
        "audit_accuracy": audit,
        "gate_accuracy": gate,
        "processor": processor,
        **fields,
    }


def test_differences_are_paired_by_rng_seed_and_on_one_kind_of_processor(lines):
    for told in (
        line("grown", 0, audit=0.62),
        line("grown", 1, audit=0.70, processor="another"),
        line("grown", 1, audit=0.63),
        line("continued_0.1", 0, audit=0.60),
        line("continued_0.1", 1, audit=0.60),
        line("continued_0.1", 2, audit=0.10),
    ):
        lines.add(told)
    assert growth_figures.differences(lines, "h1", "grown", "continued_0.1") == pytest.approx([2.0, 3.0])


def test_the_host_continued_is_compared_at_the_rate_that_the_gate_split_prefers(lines):
    for told in (line("continued_0.1", gate=0.5, audit=0.9), line("continued_0.05", gate=0.6, audit=0.1)):
        lines.add(told)
    assert growth_figures.continued(lines) == "continued_0.05"


def test_both_sides_are_compared_at_the_rate_that_the_gate_split_prefers(lines):
    for seed in range(8):
        lines.add(line("grown", seed, audit=0.60, gate=0.60))
        lines.add(line("grown_0.4", seed, audit=0.64 + 0.001 * seed, gate=0.63))
        lines.add(line("grown_0.2", seed, audit=0.90, gate=0.62))
        lines.add(line("continued_0.1", seed, audit=0.30, gate=0.58))
        lines.add(line("continued_0.4", seed, audit=0.62, gate=0.61))
    found = {figure.name: figure for figure in growth_figures.figures(lines)}
    assert found["h1_vs_continue_tuned/lower95"].repeats == pytest.approx([2.0 + 0.1 * seed for seed in range(8)])
    assert found["h1_vs_continue_tuned/lower95"].baseline.name == "continued_0.4"
    assert found["h1_vs_continue/lower95"].repeats == pytest.approx([-2.0] * 8)


def test_an_exact_p_counts_the_flips_that_are_at_least_as_far():
    assert growth_figures.sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert growth_figures.sign_flip_p([1.0, -1.0]) == 1.0


def test_holm_is_monotone_and_multiplies_by_what_is_left():
    adjusted = growth_figures.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_a_rank_correlation_goes_by_order_alone():
    assert growth_figures.rank_correlation([1.0, 2.0, 3.0], [1.0, 10.0, 11.0]) == pytest.approx(1.0)
    assert growth_figures.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)


def choice(lines, rng_seed, gate_losses, audits, picks, *, costs=1.0, base=0.5):
    for arm, gate_loss, audit in zip("abc", gate_losses, audits, strict=True):
        lines.add(line(f"arm:{arm}", rng_seed, "h2", audit=audit, gate_loss=gate_loss, contribution=0.1))
    lines.add(line("continued", rng_seed, "h2", audit=base))
    scores = {"scores": {"merit": dict(zip("abc", (3.0, 2.0, 1.0), strict=True))}, "costs": {"merit": 0.5}}
    lines.add(line("scores", rng_seed, "h2", **scores))
    for strategy, picked in picks.items():
        lines.add(line(f"pick:{strategy}", rng_seed, "h2", picked=picked, cost=0.0 if strategy == "first_arm" else costs))
        if strategy != "first_arm":
            lines.add(line(f"continued:{strategy}", rng_seed, "h2", audit=base + 0.01))


PICKS = {"first_arm": "c", "gradient_merit": "a", "successive_halving": None}


def test_a_choice_gains_what_its_arm_ends_with_over_the_host_that_got_as_much(lines):
    choice(lines, 0, (0.9, 1.0, 1.1), (0.56, 0.54, 0.52), PICKS, costs=10.0)
    found = {name: by_seed[0] for name, by_seed in growth_figures.choices(lines).items()}
    assert found["exhaustive"]["gain"] == pytest.approx(6.0)
    assert found["uniform"]["gain"] == pytest.approx(4.0)
    assert found["gradient_merit"]["gain"] == pytest.approx(5.0), "the host continued got what choosing cost"
    assert found["gradient_merit"]["over_base"] == pytest.approx(6.0)
    assert found["gradient_merit"]["share"] == pytest.approx((20 + 10) / 60)
    assert found["successive_halving"]["gain"] == 0.0, "who grows nothing gets the host continued"
    assert found["first_arm"]["gain"] == pytest.approx(2.0)
    assert growth_figures.calibration(lines)["merit"] == ([pytest.approx(1.0)], 0.5)


def gains(lines, *names):
    chosen = growth_figures.choices(lines)
    return [[chosen[name][seed]["gain"] for seed in sorted(chosen[name])] for name in names]


def test_where_the_fixed_arm_gains_next_to_nothing_the_difference_is_told_in_points(lines):
    for rng_seed in range(10):
        choice(lines, rng_seed, (0.9, 1.0, 1.1), (0.57, 0.54, 0.502 + 0.0001 * rng_seed), PICKS)
    better, low, high, unit = growth_figures.better_by(*gains(lines, "gradient_merit", "first_arm"))
    assert unit == "points"
    assert low < better < high
    assert better == pytest.approx(6.0 - 0.245)


def test_a_run_that_failed_is_told_and_counts_for_nothing(lines):
    lines.add(line("grown", 0, audit=0.62, parameters=1, flops_per_sample=1.0, seconds=1.0))
    lines.add({"part": "h1", "rng_seed": 0, "arm": "scratch_total", "processor": HERE, "failed": "TrainingDiverged: nan"})
    assert growth_figures.differences(lines, "h1", "grown", "scratch_total") == []
    assert "failed: h1 scratch_total of RNG seed 0: TrainingDiverged" in growth_figures.tables(lines)


def test_an_rng_seed_counts_only_where_one_kind_of_processor_ran_all_of_it(lines):
    choice(lines, 0, (0.9, 1.0, 1.1), (0.56, 0.54, 0.52), PICKS)
    known = [told for told in lines.lines if told["arm"] != "arm:a"]
    for told in known:
        lines.add({**told, "rng_seed": 1, "processor": "another"})
    lines.add({**lines.of(arm="arm:a")[0], "rng_seed": 1})
    assert growth_figures.complete_choices(lines) == [0]


def test_a_picture_of_what_is_known(lines, tmp_path):
    for rng_seed in range(8):
        choice(lines, rng_seed, (0.9, 1.0, 1.1), (0.57, 0.54, 0.52 + 0.001 * rng_seed), PICKS)
        lines.add(line("grown", rng_seed, audit=0.6))
        lines.add(line("continued_0.1", rng_seed, audit=0.58 + 0.001 * rng_seed))
    growth_plots.draw(lines, tmp_path / "growth.svg")
    assert "host continued, rate 0.1 (n=8)" in (tmp_path / "growth.svg").read_text(encoding="utf-8")


def test_an_rng_seed_with_a_line_missing_says_nothing_yet(lines):
    choice(lines, 0, (0.9, 1.0, 1.1), (0.56, 0.54, 0.52), PICKS)
    lines.add(line("arm:a", 1, "h2"))
    assert growth_figures.complete_choices(lines) == [0]


def test_effectiveness_is_a_ratio_of_mean_gains(lines):
    for rng_seed in range(10):
        choice(lines, rng_seed, (0.9, 1.0, 1.1), (0.57, 0.54, 0.52 + 0.001 * rng_seed), PICKS)
    ratio, low, high = growth_figures.effectiveness(*gains(lines, "gradient_merit", "first_arm"))
    assert low < ratio < high
    assert ratio == pytest.approx(6.0 / 2.45 - 1)
    few = growth_figures.effectiveness([6.0] * 7, [2.0] * 7)
    assert few == (pytest.approx(2.0), -math.inf, math.inf), "of fewer than eight nothing is known"
    drowned = growth_figures.effectiveness(
        [1.0 + 0.1 * seed for seed in range(10)], [(-1) ** seed * 5.0 + 0.4 for seed in range(10)]
    )
    assert drowned[1:] == (-math.inf, math.inf), (
        "where the other may have gained nothing at all, nothing can be said of a ratio to it"
    )
    names = {figure.name for figure in growth_figures.figures(lines)}
    assert names == {"h2_gain_share", "h2_flops_share", "ae_over_fixed/lower95"}


def test_growing_by_a_strategy_that_measures_nothing_is_what_choosing_is_measured_against(lines):
    for rng_seed in range(8):
        lines.add(line("continued_0.1", rng_seed, audit=0.50))
        lines.add(line("grown", rng_seed, audit=0.56 + 0.001 * rng_seed))
        lines.add(line("uniform", rng_seed, "strategies", audit=0.501))
        lines.add(line("first_arm", rng_seed, "strategies", audit=0.52 + 0.001 * rng_seed))
        for name in ("job_defaults", "job_defaults_2"):
            lines.add(line(name, rng_seed, "strategies", audit=0.51))
        lines.add(line(growth_plan.TUNED_DEFAULTS, rng_seed, "strategies", audit=0.53 + 0.001 * rng_seed))
    lines.add(line("grown", 8, audit=0.90))
    assert growth_figures.growing_by(lines)["first_arm"] == pytest.approx([2.0 + 0.1 * seed for seed in range(8)])
    found = {figure.name: figure for figure in growth_figures.figures(lines)}
    assert found["growing_by_first_arm/lower95"].unit == "ratio - 1"
    assert 1.0 < found["growing_by_first_arm/lower95"].value < 6.35 / 2.35 - 1
    assert 3.0 < found["defaults_vs_continue/lower95"].value < 3.35
    assert found["growing_by_uniform/lower95"].unit == "points", "a gain of 0.1 points carries no ratio"


def test_what_came_later_is_compared_with_growing_and_a_random_birth_with_one_that_incubates_apart(lines):
    for rng_seed in range(8):
        lines.add(line("grown", rng_seed, audit=0.56))
        lines.add(line("periodic", rng_seed, "further", audit=0.55))
        lines.add(line("zero", rng_seed, "birth", audit=0.54))
        lines.add(line("random", rng_seed, "birth", audit=0.52))
    assert {name: round(values[-1], 9) for name, values in growth_figures.further(lines).items()} == {
        "periodic": -1.0,
        "born random, not zero": -2.0,
    }


def test_defaults_are_confirmed_against_the_best_rate_on_their_own_rng_seeds_or_against_that_of_h1(lines):
    for rng_seed in range(8):
        lines.add(line("continued_0.1", rng_seed, audit=0.50, gate=0.9))
        lines.add(line(growth_plan.DEFAULTS, rng_seed, "confirm", audit=0.53))
    assert growth_figures.confirmed(lines) == ("continued_0.1", "h1", pytest.approx([3.0] * 8))
    for rng_seed in range(8):
        lines.add(line("continued_0.4", rng_seed, "confirm", audit=0.52, gate=0.7))
        lines.add(line("continued_0.8", rng_seed, "confirm", audit=0.51, gate=0.8))
    assert growth_figures.confirmed(lines) == ("continued_0.8", "confirm", pytest.approx([2.0] * 8))
    for rng_seed in range(8):
        lines.add(line("grown", rng_seed, audit=0.505))
        lines.add(line("scratch_total", rng_seed, "confirm", audit=0.52))
        lines.add(line(growth_plan.CONFIRMED_DEFAULTS, rng_seed, "confirm", audit=0.55))
    figures = {figure.name: figure for figure in growth_figures.figures(lines)}
    found = figures["h1_vs_continue/lower95"]
    assert figures["h1_by_hand_vs_continue/lower95"].value == pytest.approx(0.5), "`grown` keeps its figure, by another name"
    assert figures["h1_vs_scratch_total/mean"].value == pytest.approx(3.0), "of the defaults that it was grown by"
    assert (found.baseline.name, found.baseline.value) == ("continued_0.8", pytest.approx(51.0))


def test_a_part_may_count_its_rng_seeds_from_where_nothing_was_read(lines):
    plan = {**PLAN, "confirmed": (0.4,), "first_confirmed": 10}
    wanted = growth.tasks(plan, 2, ("h1", "confirm"))
    assert {task.rng_seed for task in wanted if task.part == "h1"} == {2}
    assert [(task.arm, task.rng_seed) for task in wanted if task.part == "confirm"] == [
        ("host", 12),
        (growth_plan.DEFAULTS, 12),
        ("continued_0.4", 12),
    ]
    for arm in ("host", "continued_0.4"):
        lines.add(line(arm, 12, "confirm"))
    assert [task.arm for task in wanted if task.part == "confirm" and not growth.known(lines, task, plan)] == [
        growth_plan.DEFAULTS
    ]


def test_ablations_of_an_rng_seed_are_read_from_the_one_kind_of_processor_that_ran_most_of_them(lines):
    for arm, audit in (("unchanged", 0.60), ("plateau", 0.59)):
        lines.add({**line(arm, 0, "ablations", audit=audit), "processor": "another"})
    for arm, audit in (("unchanged", 0.61), ("plateau", 0.58), ("ucb", 0.57)):
        lines.add(line(arm, 0, "ablations", audit=audit))
    assert growth_figures.ablated(lines) == {"plateau": [pytest.approx(-3.0)], "ucb": [pytest.approx(-4.0)]}


def test_what_starts_from_a_host_is_run_again_on_another_kind_of_processor_unless_all_of_it_is_known(lines):
    together = ["host", "grown", "continued_0.1", "continued_0.05"]
    for arm in together[:-1]:
        lines.add(line(arm, processor="another"))
    lines.add(line("scratch_total", processor="another"))
    missing = [task.arm for task in growth.tasks(PLAN, 0, ("h1",)) if not growth.known(lines, task, PLAN)]
    assert set(together) <= set(missing)
    assert "scratch_total" not in missing
    lines.add(line(together[-1], processor="another"))
    missing = [task.arm for task in growth.tasks(PLAN, 0, ("h1",)) if not growth.known(lines, task, PLAN)]
    assert missing == ["scratch_marginal", "wide_parameters", "wide_flops"]


def test_the_short_form_runs_from_end_to_end(tmp_path):
    command = [
        sys.executable,
        "bench/growth.py",
        "--quick",
        "--repeats",
        "1",
        "--part",
        "h1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "H1: points of audit accuracy" in done.stdout
    names = {figure.name for figure in harness.read(tmp_path / "found.json").figures}
    assert names == {"h1_vs_scratch_total/mean"}, "one RNG seed has no interval"
