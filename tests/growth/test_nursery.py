"""The nursery: candidates learn side by side as they would alone, the best one goes on, the others leave no trace."""

from __future__ import annotations

import pytest
import torch
from small_growth import (
    BATCH,
    GATE,
    Kernels,
    accuracy,
    batches,
    end,
    epoch,
    grower,
    loss,
    same,
    seed_of,
    steps,
    tensors_of,
    until,
)
from torch import nn

from esperd.growth.contribution import measure
from esperd.growth.gradients import GradientHealth
from esperd.growth.nursery import choose, screenings
from esperd.messages.growth import Contribution, Stage
from esperd.messages.jobs import Gates
from esperd.messages.policy import Arm, Decision
from esperd.messages.telemetry import ScreeningEnded, StageChanged

ARMS = [("first", "conv_light"), ("first", "squeeze_excite"), ("second", "conv_light"), ("second", "depthwise")]


def candidate(slot: str, blueprint: str, screening: str = "a") -> Decision:
    return Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), screening=screening, reason="a test wants it")


def screening(events: list | None = None, **options):
    """A trained host with four candidates."""
    grown = grower(events, **options)
    torch.manual_seed(0)
    epoch(grown)
    for arm in ARMS:
        assert grown.apply(candidate(*arm)) is None
    return grown


@pytest.mark.parametrize("incubation", ["lookahead", "joint", "straight_through"])
def test_candidates_learn_as_they_would_alone_whatever_the_jobs_own_mode(incubation):
    together = screening(incubation=incubation, screening_epochs=9)
    torch.manual_seed(5)
    for number in range(5):
        steps(together, batches(number))  # 20 steps
    for number, (slot, blueprint) in enumerate(ARMS):
        alone = grower(incubation="lookahead", incubation_epochs=9)
        torch.manual_seed(0)
        epoch(alone)
        alone.network.germinated = number
        assert alone.apply(Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), reason="")) is None
        torch.manual_seed(5)
        for other in range(5):
            steps(alone, batches(other))
        name = f"{slot}#{number}"
        mine, theirs = together.network.seed(name).state_dict(), alone.network.seed(name).state_dict()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=0, atol=1e-4)


def test_the_host_cannot_tell_that_candidates_learn_behind_it():
    alone, growing = grower(), screening(screening_epochs=9)
    torch.manual_seed(0)
    epoch(alone)
    for grown in (alone, growing):
        torch.manual_seed(7)
        steps(grown, batches(3))
    hosts = [
        {name: tensor for name, tensor in tensors_of(grown).items() if name.startswith("host.")} for grown in (alone, growing)
    ]
    assert same(*hosts)


def test_second_passes_of_all_candidates_start_from_one_pass_of_the_host():
    grown = screening(screening_epochs=9)
    steps(grown, batches(0))
    calls = []
    grown.network.host.first.register_forward_pre_hook(lambda _module, _inputs: calls.append("first"))
    steps(grown, batches(1)[:1])
    assert calls == ["first"], "four candidates and the host: the first stage runs once"


def test_the_best_candidate_goes_on_and_the_others_are_out_without_a_rest():
    events = []
    grown = screening(events, screening_epochs=2, dropout=0.0)
    epoch(grown)
    assert len(screenings(grown.network.seeds())["a"]) == 4
    steps(grown, batches(grown.epoch))
    expected = {}
    for seed in grown.network.seeds():
        measured = measure(grown.network, [GATE], loss, accuracy, variants={"on": {seed.name: 1.0}})
        expected[seed.name] = float((measured.loss - measured.variants["on"][0]).mean())
    end(grown)
    (ended,) = [event for event in events if isinstance(event, ScreeningEnded)]
    best = max(expected, key=expected.__getitem__)
    assert ended.winner == best
    assert {each.seed: each.prospect.loss for each in ended.candidates} == {
        name: pytest.approx(value, abs=1e-5) for name, value in expected.items()
    }
    assert all(each.incubation_loss is not None for each in ended.candidates)
    assert [seed.name for seed in grown.network.seeds()] == [best]
    assert grown.resting == {}
    losers = {outcome.seed: outcome for outcome in grown.outcomes}
    assert losers.keys() == expected.keys() - {best}
    told = {record.seed: (record.stage, record.incubation_loss) for record in grown.screened_out}
    shown = {each.seed: (Stage.CULLED, each.incubation_loss) for each in ended.candidates if each.seed != best}
    assert told == shown, "as they ended, for whoever decides: they are in no record any more"
    assert all(outcome.reason.startswith(f"screened out for {best}: it promised") for outcome in losers.values())
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host", best]
    slot = next(iter(grown.network.seeds())).record.slot
    other = "second" if slot == "first" else "first"
    assert grown.apply(Decision(action="germinate", arm=Arm(slot=other, blueprint="norm"), reason="")) is None


@pytest.mark.parametrize(("incubation", "alpha"), [("lookahead", 0.0), ("joint", 1.0), ("straight_through", 0.0)])
def test_the_winner_goes_on_in_the_jobs_own_mode_with_what_it_has_learned(incubation, alpha):
    grown = screening(incubation=incubation, incubation_epochs=2, dropout=0.0)
    steps(grown, batches(grown.epoch))
    learned = {seed.name: {key: value.clone() for key, value in seed.state_dict().items()} for seed in grown.network.seeds()}
    end(grown)
    (winner,) = grown.network.seeds()
    assert (winner.stage, winner.alpha, winner.screening) == (Stage.TRAINING, alpha, "")
    assert winner.presence == {"lookahead": "silent", "joint": "whole", "straight_through": "taught"}[incubation]
    assert winner.life.epochs_in_stage == 0
    assert same(dict(winner.state_dict()), learned[winner.name])
    assert until(grown, winner.name, Stage.PROBATIONARY)


def test_what_was_gathered_in_a_screening_says_nothing_of_the_winners_own_incubation():
    grown = screening(incubation_epochs=9, dropout=0.0)
    steps(grown, batches(grown.epoch))
    screened = {seed.name: grown.incubator.health(seed) for seed in grown.network.seeds()}
    assert all(health.ratio is not None for health in screened.values())
    end(grown)
    (winner,) = grown.network.seeds()
    assert winner.gradient_ratio == screened[winner.name].ratio
    assert grown.incubator.gathered == {}
    assert grown.incubator.health(winner) == GradientHealth()
    steps(grown, batches(grown.epoch))
    assert float(grown.incubator.incubation(winner).ratio.sums[-1]) == 1.0, "one sample: that of its own incubation"


def prospect(loss_saved: float) -> Contribution:
    return Contribution(loss=loss_saved, lower=loss_saved - 0.1, upper=loss_saved + 0.1, confidence=0.95, samples=64, epoch=3)


def candidates(*promises: float | None):
    net = grower().network
    seeds = [seed_of(nn.Identity(), net.slots[0], number, alpha=0.0) for number in range(len(promises))]
    for seed, promise in zip(seeds, promises, strict=True):
        seed.prospect = None if promise is None else prospect(promise)
    return seeds


def test_no_candidate_goes_on_when_the_best_of_them_would_raise_the_loss_too_much():
    seeds = candidates(-0.4, -0.9, None)
    choice = choose(seeds, gate_loss=1.0, largest_rise=0.25)
    assert choice.winner is None
    assert [reason for _, reason in choice.losers] == [
        "switched on it would change the loss by +0.4000",
        "switched on it would change the loss by +0.9000",
        "it was never measured",
    ]
    assert choose(seeds, gate_loss=1.0, largest_rise=0.5).winner is seeds[0]


def test_a_candidate_whose_promise_is_no_number_never_goes_on():
    seeds = candidates(float("nan"), 0.1)
    assert choose(seeds, gate_loss=1.0, largest_rise=0.25).winner is seeds[1]
    assert choose(seeds[:1], gate_loss=1.0, largest_rise=0.25).winner is None


def test_two_screenings_are_judged_apart():
    grown = grower(dropout=0.0)
    epoch(grown)
    grown.apply(candidate("first", "conv_light", "a"))
    grown.apply(candidate("second", "conv_light", "b"))
    epoch(grown)
    assert [seed.name for seed in grown.network.seeds()] == ["first#0", "second#1"], "each was the only one of its screening"


def test_a_slot_takes_candidates_of_one_screening_and_nobody_else():
    grown = screening(screening_epochs=9)
    taken = "G0: slot first is taken or at rest"
    assert grown.apply(candidate("first", "norm", "another")) == taken
    assert grown.apply(Decision(action="germinate", arm=Arm(slot="first", blueprint="norm"), reason="")) == taken
    assert grown.apply(candidate("first", "norm")) is None


def test_a_candidate_that_does_not_fit_is_refused_and_the_others_go_on():
    grown = grower(source=Kernels(), screening_epochs=9)
    epoch(grown)
    grown.apply(candidate("first", "conv_light"))
    assert "mlp" in grown.apply(candidate("second", "mlp_gated"))
    assert [seed.name for seed in grown.network.seeds()] == ["first#0"]


def test_a_screening_is_charged_as_incubation():
    grown = screening(screening_epochs=9)
    spent = dict(grown.ledger.spent)
    steps(grown, batches(0)[:1])
    assert grown.ledger.spent["incubation"] > spent["incubation"]
    assert grown.ledger.spent["train"] - spent["train"] == pytest.approx(grown.ledger.cost("train", "host") * BATCH)


def test_candidates_pass_no_gate_before_their_screening_ends():
    events = []
    grown = screening(events, screening_epochs=3, incubation_epochs=1, settings=Gates(min_gradient_ratio=0.0))
    for _ in range(2):
        epoch(grown)
    assert {event.after for event in events if isinstance(event, StageChanged)} == {Stage.GERMINATED, Stage.TRAINING}
