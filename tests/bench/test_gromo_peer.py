"""What the comparison with gromo promises: one start, nothing beyond the limits, and an absent gromo is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import gromo_hosts
import gromo_peer
import gromo_run
import harness


def spec(arm="esperd", flops=60e6, most_parameters=1000, audit=False):
    plan = {**gromo_peer.QUICK, "rate": 0.1}
    return {
        "arm": arm,
        "rng_seed": 3,
        "audit": audit,
        "data": None,
        "plan": plan,
        "flops": flops,
        "most_parameters": most_parameters,
    }


def test_an_absent_gromo_is_told_and_recorded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gromo_peer.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "argv", ["gromo_peer.py", "--quick", "--json", str(tmp_path / "gromo.json")])
    gromo_peer.main()
    assert "gromo is absent: nothing is compared" in capsys.readouterr().out
    found = harness.read(tmp_path / "gromo.json")
    assert found.settings["gromo"] == "absent"
    assert found.figures == ()


def test_the_full_form_without_gromo_fails(monkeypatch):
    monkeypatch.setattr(gromo_peer.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "argv", ["gromo_peer.py"])
    with pytest.raises(SystemExit) as ended:
        gromo_peer.main()
    assert ended.value.code == 1


@pytest.mark.parametrize(("task", "parameters"), [("digits", 682), ("digits_narrow", 330), ("cifar", 5998)])
def test_starts_have_the_parameters_that_the_protocol_says(task, parameters):
    plan = gromo_peer.TASKS[task]
    shape = (1, 3, 16, 16) if task == "cifar" else (1, 1, 8, 8)
    data = gromo_run.lab.Data(task, *3 * ((torch.zeros(shape), torch.zeros(1)),), channels=())
    assert sum(parameter.numel() for parameter in gromo_run.start(plan, data, 0).parameters()) == parameters


@pytest.mark.parametrize("arm", gromo_peer.OURS)
def test_esperd_keeps_to_the_flops_and_to_the_parameters_it_is_given(arm):
    line = gromo_run.run(spec(arm, most_parameters=1000))
    assert 682 <= line["parameters"] <= 1000
    assert any("germinate" in decision for decision in line["decisions"])
    largest_step = 100e3 * 64  # FLOPs of a step: what is begun is finished
    assert 60e6 <= sum(line["flops"].values()) < 60e6 + 360 * 20e3 + largest_step
    assert line["flops"]["gate"] > 0


def test_the_start_alone_does_not_grow():
    line = gromo_run.run(spec("host", flops=20e6))
    assert line["parameters"] == 682
    assert line["kept"] == []


def test_audit_is_read_only_where_it_is_asked_for():
    assert "audit_accuracy" not in gromo_run.run(spec("host", flops=5e6))
    assert 0 <= gromo_run.run(spec("host", flops=5e6, audit=True))["audit_accuracy"] <= 1


def test_weights_of_another_network_are_refused():
    with pytest.raises(RuntimeError, match="other parameters"):
        gromo_hosts.copy_weights(gromo_hosts.dense(64, 4), gromo_hosts.dense(64, 8), torch.zeros(2, 1, 8, 8))


def test_a_figure_is_the_mean_over_rng_seeds_against_gromos():
    figure = gromo_peer.mean_figure("gromo_digits/accuracy", (0.9, 0.96, 0.96), (0.9, 0.9, 0.9), "share", "higher")
    assert (figure.value, figure.baseline.value) == (pytest.approx(0.94), pytest.approx(0.9))
    assert figure.ratio == pytest.approx(0.94 / 0.9)
    assert figure.baseline.name == "gromo"


def line(arm, rng_seed, accuracy):
    return {
        "task": "digits",
        "arm": arm,
        "rng_seed": rng_seed,
        "rate": 0.1,
        "tuning": False,
        "audit_accuracy": accuracy,
        "flops": {"train": 2e6, "gate": 1e6},
    }


def test_only_rng_seeds_that_both_sides_have_run_are_compared(tmp_path):
    lines = gromo_run.lab.Lines(tmp_path / "none.jsonl", {}, keep=False)
    comparison = gromo_peer.Comparison("digits", gromo_peer.TASKS["digits"], None, lines)
    comparison.rates = {"esperd": 0.1, "tiny": 0.1}
    for known in (line("esperd", 2, 0.9), line("tiny", 0, 0.8), line("tiny", 2, 0.7), line("esperd", 1, 0.6)):
        lines.add(known)
    assert comparison.paired("esperd", "tiny", "audit_accuracy") == ([0.9], [0.7])
    assert comparison.paired("esperd", "tiny", "flops") == ([3e6], [3e6])


def test_gromo_starts_from_the_same_weights_and_pays_for_its_statistics():
    pytest.importorskip("gromo", reason="gromo is not installed: make bench-deps")
    line = gromo_run.run(spec("tiny"))
    assert line["parameters"] == 1482
    assert min(line["flops"][purpose] for purpose in ("train", "statistics", "solve", "line_search")) > 0
