"""The bench of growth on a text: what its splits hold, and every arm of H1 from end to end."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import growth  # noqa: E402 - found where the line above says
import growth_figures  # noqa: E402
import growth_plan  # noqa: E402
import lab  # noqa: E402
import texts  # noqa: E402

SIZE = 30_000


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "EPOCH", 64)
    monkeypatch.setattr(texts, "WINDOWS", {"train": 200, "gate": 24, "audit": 24})
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(30)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(SIZE))[:SIZE])
    return lab.load(path)


def test_parts_of_a_text_follow_one_another_with_a_gap_and_windows_do_not_overlap(tmp_path):
    path = tmp_path / "places.txt"
    path.write_text("".join(chr(0x4E00 + place) for place in range(20_000)))  # every character says where it stands
    data = lab.load(path)
    begin = 0
    for split in lab.SPLITS:
        windows, following = getattr(data, split)
        assert (following == windows + 1).all()
        assert len(windows) > 10
        assert (windows[1:, 0] >= windows[:-1, 0] + texts.CONTEXT).all()
        assert windows.min() >= begin
        begin = int(following.max()) + texts.GAP
    assert begin < data.vocabulary + texts.GAP


def test_h1_on_a_text_grows_the_transformer_and_trains_what_it_grew_from_scratch(data, tmp_path, monkeypatch):
    tries = growth_plan.policy(strategy="ucb")  # measures nothing first: an epoch of this text is shorter than that
    monkeypatch.setattr(growth_plan, "policy", lambda: tries)
    plan = growth_plan.plan_of(data, quick=True)
    lines = lab.Lines(tmp_path / "growth.jsonl", growth_plan.protocol(data, plan), keep=False)
    needed = {}
    for arm in ("grown", "scratch_marginal"):
        needed[arm] = growth.run(growth.Task("h1", 0, arm), plan, needed, str(tmp_path / "words.txt"), str(tmp_path))
        lines.add({"part": "h1", "rng_seed": 0, "arm": arm, **needed[arm]})
    assert needed["grown"]["decisions"], "something was decided"
    spent = {arm: sum(line["flops"].values()) for arm, line in needed.items()}
    assert spent["grown"] == pytest.approx(spent["scratch_marginal"], rel=0.15)
    assert needed["scratch_marginal"]["parameters"] == needed["grown"]["parameters"]
    assert {task.arm for task in growth.tasks(plan, 0, ("h1",))} == {
        "host",
        "grown",
        "continued_0.01",
        "continued_0.003",
        "scratch_total",
        "scratch_marginal",
    }
    assert "H1: points of audit accuracy" in growth_figures.tables(lines)
