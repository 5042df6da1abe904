"""The bench of a learned strategy: it learns what there is to learn, and ships only if it beats both peers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import choosing  # noqa: E402 - found where the line above says
import growth_plan  # noqa: E402
import lab  # noqa: E402
import learned  # noqa: E402
import learned_graph  # noqa: E402

ARMS = tuple(f"{blueprint} at features.stage{stage}" for stage in (1, 2, 3) for blueprint in choosing.BLUEPRINTS)
CONTEST = "contest 1 flops"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(learned_graph, "STEPS", 40)
    monkeypatch.setattr(learned, "unseen_blueprint", lambda known, arms: [torch.zeros(len(arms))] * len(known.gains))
    monkeypatch.setattr(learned_graph, "NETWORKS", 1)


@pytest.fixture
def data():
    images = torch.zeros(4, 3, 16, 16)
    return lab.Data("tiny", *3 * ((images, torch.zeros(4)),), channels=(12, 16, 24))


def record(rng_seed, best_by_merit):
    """An RNG seed in which the arm of the largest merit is the best one, or the one whose turn it is."""
    generator = torch.Generator().manual_seed(rng_seed)
    merits = torch.rand(len(ARMS), generator=generator)
    gains = merits if best_by_merit else torch.rand(len(ARMS), generator=generator)
    of = {
        "host": {"gate_accuracy": 0.6},
        "continued": {"gate_loss": 1.0, "audit_accuracy": 0.5},
        "scores": {
            "scores": {
                "merit": dict(zip(ARMS, merits.tolist(), strict=True)),
                CONTEST: dict.fromkeys(ARMS, None) | {ARMS[3]: 0.1},
            }
        },
        **{f"pick:{name}": {"picked": ARMS[0]} for name in growth_plan.PICKING},
    }
    return learned_graph.Record(of, (1.0 - gains).tolist(), (0.5 + gains / 10).tolist())


def test_a_graph_holds_the_host_in_order_and_the_seed_behind_its_stage(data):
    known = learned_graph.graphs(data, list(ARMS), [record(0, best_by_merit=True)])
    assert known.nodes.shape[:3] == (1, 12, 6)
    at_stage_2 = ARMS.index("depthwise at features.stage2")
    assert known.back[at_stage_2, 2].nonzero().flatten().tolist() == [3, 5], "stage 2 feeds stage 3 and the seed"
    assert known.into[at_stage_2, 5].nonzero().flatten().tolist() == [2]
    assert known.into[at_stage_2, 3].nonzero().flatten().tolist() == [2, 5]
    assert known.nodes[0, 0, 5, 7 : 7 + 4].tolist() == [1.0, 0.0, 0.0, 0.0], "the blueprint of the seed"


def test_what_audit_says_has_no_part_in_learning_or_choosing(data):
    found = [record(seed, best_by_merit=True) for seed in range(3)]
    other = [learned_graph.Record(one.of, one.losses, one.audits[::-1]) for one in found]
    first, second = (learned_graph.graphs(data, list(ARMS), told) for told in (found, other))
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(first.gains, second.gains)


def test_it_ships_where_it_beats_both_peers_and_says_by_how_much(data):
    told, figures = learned.report(data, ARMS, [record(seed, best_by_merit=True) for seed in range(8)])
    assert [line.partition(" points")[0].rpartition(" ")[0] for line in told.splitlines()[-2:]] == [
        f"Verdict: {learner} ships; over gradient_merit: lower end" for learner in ("learned", "weighted")
    ]
    names = {f"{learner}_over_{peer}/mean" for learner in ("learned", "weighted") for peer in ("gradient_merit", "best_fixed")}
    assert {figure.name for figure in figures} == names
    assert all(figure.value > 0 for figure in figures)


def test_a_score_weighs_what_it_proved_worth_in_the_other_rng_seeds(data):
    found = [record(seed, best_by_merit=True) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    for one in found:
        noise = torch.rand(len(ARMS), generator=generator).tolist()
        one.of["scores"]["scores"] = {
            "merit": one.of["scores"]["scores"]["merit"],
            "backwards": {arm: -value for arm, value in one.of["scores"]["scores"]["merit"].items()},
            "noise": dict(zip(ARMS, noise, strict=True)),
        }
    known = learned_graph.graphs(data, list(ARMS), found)
    assert learned.agreement(known, learned.weighted(known, ARMS, found)) > 0.8
    known.gains[0] = -known.gains[0]
    turned = learned.weighted(known, ARMS, found)
    assert learned.agreement(known, turned) < 0.8, "what an RNG seed came to has no part in its own weights"
    assert turned[0].equal(learned.weighted(learned_graph.graphs(data, list(ARMS), found), ARMS, found)[0])


def test_a_score_that_knows_nothing_of_an_arm_has_no_say_on_it(data):
    found = [record(seed, best_by_merit=True) for seed in range(3)]
    known = learned_graph.graphs(data, list(ARMS), found)
    with_contest = learned.weighted(known, ARMS, found)
    for one in found:
        del one.of["scores"]["scores"][CONTEST]  # it spoke of one arm alone
    assert all(torch.equal(a, b) for a, b in zip(with_contest, learned.weighted(known, ARMS, found), strict=True))


@pytest.mark.parametrize(
    ("over_merit", "over_fixed", "ships"), [(0.1, 0.2, True), (0.1, -0.2, False), (-0.1, 0.2, False), (-math.inf, 0.2, False)]
)
def test_it_ships_only_if_both_intervals_lie_above_0(over_merit, over_fixed, ships):
    assert learned.ships({"gradient_merit": over_merit, "best_fixed": over_fixed}) is ships


def test_of_too_few_rng_seeds_there_is_no_interval_and_it_does_not_ship(data):
    told, _ = learned.report(data, ARMS, [record(seed, best_by_merit=True) for seed in range(3)])
    verdict = told.splitlines()[-1]
    assert verdict.startswith("Verdict: weighted does not ship")
    assert "no interval of fewer than eight RNG seeds" in verdict


def test_a_strategy_that_grows_nothing_ends_with_the_host_continued(data):
    found = [record(0, best_by_merit=True)]
    assert learned.reached(found, [None], "audits") == [0.5]
    assert learned.reached(found, [None], "losses") == [1.0]
