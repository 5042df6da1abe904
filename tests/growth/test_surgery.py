"""Surgery: an operation completes, or says why not, or raises; whatever did not happen left no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from small_growth import GATE, SAMPLES, Kernels, batches, epoch, germinate, grower, same, steps, tensors_of, until
from torch import nn

from esperd.errors import BlueprintRejected, IllegalTransition, InvalidSlot, NotTraining, UnknownName
from esperd.growth.source import GrownModule
from esperd.messages.growth import Contribution, Stage
from esperd.messages.jobs import Gates
from esperd.messages.policy import Decision
from esperd.messages.telemetry import GateEvaluated, StageChanged


def cull(seed):
    return Decision(action="cull", seed=seed, reason="it does not pay")


def fossilize(seed):
    return Decision(action="fossilize", seed=seed, reason="it pays")


def fingerprint(grown):
    """Everything structural about a grower."""
    return (
        tensors_of(grown),
        [group["name"] for group in grown.optimizer.param_groups],
        grown.network.germinated,
        set(grown.resting),
        torch.get_rng_state(),
    )


def unchanged(before, grown):
    tensors, *rest, rng = before
    now_tensors, *now, now_rng = fingerprint(grown)
    return same(tensors, now_tensors) and rest == now and torch.equal(rng, now_rng)


class Raises(nn.Module):
    """Works when it is built, and fails on real activations."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        raise ValueError("cannot reshape")


class Tuple(Raises):
    def forward(self, x):
        return (x, x)


class Shrinks(Raises):
    def forward(self, x):
        return self.module(x)[:, :, 1:]


class Unavailable(Kernels):
    def grow(self, blueprint, slot, seed, operator, epoch) -> GrownModule:
        raise ConnectionError("no cache")


@pytest.fixture
def events():
    return []


@pytest.fixture
def grown(events):
    grown = grower(events, dropout=0.0)
    torch.manual_seed(0)
    epoch(grown)
    return grown


def changes(events):
    return [(event.seed, event.before, event.after) for event in events if isinstance(event, StageChanged)]


def test_a_germinated_seed_incubates_at_its_slot_with_a_group_of_its_own(grown, events):
    before = tensors_of(grown)
    outputs = grown.network.eval()(GATE[0])
    grown.network.train()
    assert grown.apply(germinate("conv_light", "first")) is None
    seed = grown.network.seed("first#0")
    assert (seed.stage, seed.alpha, seed.epoch, seed.blueprint) == (Stage.TRAINING, 0.0, 1, "conv_light")
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host", "first#0"]
    assert torch.equal(grown.network.eval()(GATE[0]), outputs)
    grown.network.train()
    after = tensors_of(grown)
    assert same(before, {name: after[name] for name in before})
    assert changes(events) == [
        ("first#0", Stage.DORMANT, Stage.GERMINATED),
        ("first#0", Stage.GERMINATED, Stage.TRAINING),
    ]
    assert [event.verdict.gate for event in events if isinstance(event, GateEvaluated)] == ["G0", "G1"]


@pytest.mark.parametrize(
    ("blueprint", "reason"),
    [("mlp_residual", "mlp_residual is for mlp slots, second is cnn"), ("unheard_of", "there is no blueprint 'unheard_of'")],
)
def test_a_blueprint_that_does_not_fit_is_refused(grown, events, blueprint, reason):
    before = fingerprint(grown)
    assert grown.apply(germinate(blueprint, "second")) == reason
    assert unchanged(before, grown)
    assert changes(events) == []


def test_a_taken_slot_is_refused_by_g0(grown, events):
    grown.apply(germinate("conv_light", "first"))
    before = fingerprint(grown)
    events.clear()
    assert grown.apply(germinate("norm", "first")) == "G0: slot first is taken or at rest"
    assert unchanged(before, grown)
    assert [event.verdict.passed for event in events] == [False]


def test_a_slot_with_a_fossilized_seed_takes_another(grown):
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    seed = grown.network.seed("first#0")
    seed.contribution = proven(grown.epoch)
    assert grown.apply(fossilize("first#0")) is None
    assert grown.apply(germinate("norm", "first")) is None
    assert [seed.name for seed in grown.network.port("first")] == ["first#0", "first#1"]


def test_a_seed_that_fails_its_probe_is_culled_before_it_learns(events):
    grown = grower(events, source=Kernels(Shrinks))
    epoch(grown)
    weights = {name: tensor.clone() for name, tensor in grown.network.state_dict().items()}
    refusal = grown.apply(germinate("conv_light", "first"))
    assert "G1: it changes the slot's shape" in refusal
    assert same(grown.network.state_dict(), weights)
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host"]
    assert list(grown.network.seeds()) == []
    assert grown.resting["first"].stage is Stage.CULLED
    assert [(outcome.stage, outcome.reason) for outcome in grown.outcomes] == [(Stage.CULLED, refusal)]


@pytest.mark.parametrize(("wrap", "reason"), [(Raises, "ValueError: cannot reshape"), (Tuple, "AttributeError")])
def test_a_seed_that_raises_when_probed_is_rejected_and_leaves_the_network_as_it_was(events, wrap, reason):
    grown = grower(events, source=Kernels(wrap))
    epoch(grown)
    outputs = grown.network.eval()(GATE[0])
    grown.network.train()
    tensors, rng = tensors_of(grown), torch.get_rng_state()
    with pytest.raises(BlueprintRejected, match=reason):
        grown.apply(germinate("conv_light", "first"))
    assert torch.equal(grown.network.eval()(GATE[0]), outputs)
    grown.network.train()
    assert same(tensors_of(grown), tensors)
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(grown.network.seeds()) == []
    assert changes(events)[-1] == ("first#0", Stage.GERMINATED, Stage.CULLED)
    assert reason in grown.outcomes[0].reason
    assert grown.apply(germinate("conv_light", "first")) == "G0: slot first is taken or at rest"
    epoch(grown)


def test_a_source_that_raises_leaves_everything_as_it_was(grown, events):
    grown.source = Unavailable()
    before = fingerprint(grown)
    with pytest.raises(ConnectionError):
        grown.apply(germinate("conv_light", "first"))
    assert unchanged(before, grown)
    assert changes(events) == []
    grown.source = Kernels()
    assert grown.apply(germinate("conv_light", "first")) is None


def test_nothing_germinates_before_a_batch_was_seen(events):
    grown = grower(events)
    grown.sample = None
    before = fingerprint(grown)
    with pytest.raises(IllegalTransition, match="once a batch was seen"):
        grown.apply(germinate("conv_light", "first"))
    assert unchanged(before, grown)
    assert list(grown.network.seeds()) == []
    assert events == []


def test_a_culled_seed_leaves_network_and_optimiser_and_its_slot_rests(grown, events):
    grown.apply(germinate("conv_light", "first"))
    grown.apply(germinate("norm", "second"))
    parameters = list(grown.network.seed("first#0").parameters())
    grown.network.train()
    grown.train_step(*grown.sample)
    assert grown.apply(cull("first#0")) is None
    assert [seed.name for seed in grown.network.seeds()] == ["second#1"]
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host", "second#1"]
    assert not any(parameter in grown.optimizer.state for parameter in parameters)
    assert "first#0" not in grown.incubator.gathered
    outcome = grown.outcomes[0]
    assert (outcome.seed, outcome.stage, outcome.reason) == ("first#0", Stage.CULLED, "it does not pay")
    records = {record.seed: (record.stage, record.alpha, record.reason) for record in grown.records()}
    assert records["first#0"] == (Stage.CULLED, 0.0, "it does not pay")
    with pytest.raises(InvalidSlot, match="no seed 'first#0'"):
        grown.apply(cull("first#0"))


def test_a_slot_is_free_again_after_its_embargo_and_reset(grown):
    grown.apply(germinate("conv_light", "first"))
    grown.apply(cull("first#0"))
    stages = []
    while grown.resting:
        assert grown.apply(germinate("norm", "first")) == "G0: slot first is taken or at rest"
        epoch(grown)
        stages.append([record.stage for record in grown.records()])
    assert stages == [[Stage.EMBARGOED], [Stage.RESETTING], []]
    assert grown.apply(germinate("norm", "first")) is None
    assert grown.network.seed("first#1").stage is Stage.TRAINING


def test_a_slot_rests_as_long_after_a_timeout_as_after_a_decision(events):
    grown = grower(events, probation_epochs=1)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    while "first" not in grown.resting:
        epoch(grown)
    assert grown.resting["first"].stage is Stage.CULLED, "it has not rested an epoch yet"
    assert "timeout" in grown.outcomes[0].reason
    epochs = 0
    while grown.resting:
        epoch(grown)
        epochs += 1
    assert epochs == 3


def proven(epoch, samples=SAMPLES):
    return Contribution(loss=0.1, lower=0.05, upper=0.15, confidence=0.95, samples=samples, epoch=epoch)


def test_a_proven_seed_becomes_permanent_and_goes_on_training(grown):
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    seed.contribution = proven(grown.epoch)
    assert grown.apply(fossilize("first#0")) is None
    assert seed.stage is Stage.FOSSILIZED
    assert not seed.lives
    outcome = grown.outcomes[0]
    assert (outcome.stage, outcome.reason, outcome.contribution) == (Stage.FOSSILIZED, "it pays", seed.contribution)
    weights = copy.deepcopy(seed.state_dict())
    for _ in range(6):
        epoch(grown)
    assert seed.stage is Stage.FOSSILIZED
    assert not same(seed.state_dict(), weights)
    with pytest.raises(IllegalTransition):
        grown.apply(cull("first#0"))
    with pytest.raises(IllegalTransition):
        grown.apply(fossilize("first#0"))
    assert seed.stage is Stage.FOSSILIZED


def test_fossilizing_needs_a_contribution_measured_at_this_decision_point(grown):
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    assert seed.contribution is None
    stale = "G5: its contribution was not measured at this decision point"
    assert grown.apply(fossilize("first#0")) == stale
    seed.contribution = proven(grown.epoch - 1)
    assert grown.apply(fossilize("first#0")) == stale
    seed.contribution = proven(grown.epoch, samples=4)
    assert "too few" in grown.apply(fossilize("first#0"))
    grown.settings = Gates(min_contribution=0.06)
    seed.contribution = proven(grown.epoch)
    assert "not above 0.06" in grown.apply(fossilize("first#0"))
    assert (seed.stage, seed.life.reason) == (Stage.PROBATIONARY, "")
    assert not seed.verdict.passed


def set_alpha(seed, alpha):
    return Decision(action="set_alpha", seed=seed, alpha=alpha, reason="a test wants it")


def test_a_seed_fades_to_a_part_of_itself_and_is_watched_there(grown, events):
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    assert grown.apply(set_alpha("first#0", 0.4)) is None
    assert (seed.stage, seed.alpha) == (Stage.BLENDING, 1.0)
    steps(grown, batches(grown.epoch)[:2])
    assert 0.4 < seed.alpha < 1.0
    assert until(grown, "first#0", Stage.SHADOWING).alpha == 0.4
    assert until(grown, "first#0", Stage.PROBATIONARY).alpha == 0.4
    assert grown.records()[0].alpha_target == 0.4
    assert seed.life.reason == ""
    assert grown.apply(set_alpha("first#0", 0.4)) == "the alpha of first#0 is 0.4 already"


def test_a_seed_that_is_to_leave_fades_out_learns_nothing_more_and_is_then_gone(grown, events):
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    assert grown.apply(set_alpha("first#0", 0.0)) is None
    assert [group["name"] for group in grown.optimizer.param_groups] == ["host"]
    assert seed.life.reason == "a test wants it"
    weights = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    steps(grown, batches(grown.epoch)[:3])
    assert 0.0 < seed.alpha < 1.0
    assert same(weights, dict(seed.state_dict()))
    epoch(grown)
    assert seed.stage is Stage.CULLED
    assert list(grown.network.seeds()) == []
    assert grown.outcomes[-1].reason == "a test wants it"
    assert changes(events)[-1] == ("first#0", Stage.BLENDING, Stage.CULLED)
    assert grown.resting["first"] is seed


@pytest.mark.parametrize("alpha", [None, -0.1, 1.5])
def test_an_alpha_must_be_a_share(grown, alpha):
    grown.apply(germinate("conv_light", "first"))
    with pytest.raises(IllegalTransition, match="alpha must be given from 0 to 1"):
        grown.apply(set_alpha("first#0", alpha))


def test_alpha_is_only_retargeted_where_it_rests(grown):
    grown.apply(germinate("conv_light", "first"))
    with pytest.raises(IllegalTransition, match="first#0 is training; its alpha can be changed when it rests"):
        grown.apply(set_alpha("first#0", 0.5))
    assert grown.network.seed("first#0").alpha_target == 1.0


def test_nothing_germinates_in_eval_mode(grown):
    grown.network.eval()
    before = fingerprint(grown)
    with pytest.raises(NotTraining, match=r"call network\.train\(\) first"):
        grown.apply(germinate("conv_light", "first"))
    assert unchanged(before, grown)


def test_a_seed_that_still_learns_cannot_be_fossilized(grown):
    grown.apply(germinate("conv_light", "first"))
    with pytest.raises(IllegalTransition, match="training seed cannot be fossilized"):
        grown.apply(fossilize("first#0"))


@pytest.mark.parametrize("action", ["germinate", "cull", "fossilize", "set_alpha"])
def test_a_decision_must_name_what_it_is_about(grown, action):
    with pytest.raises(IllegalTransition, match="must name"):
        grown.apply(Decision(action=action, reason="vague"))


def test_an_unknown_action_or_slot_lists_what_exists(grown):
    with pytest.raises(UnknownName, match="'amputate'; there are: cull, fossilize, germinate, set_alpha"):
        grown.apply(Decision(action="amputate", reason="x"))
    with pytest.raises(InvalidSlot, match="slots are: first, second"):
        grown.apply(germinate("norm", "third"))


def test_what_is_unproven_when_the_budget_ends_is_removed(grown):
    grown.apply(germinate("conv_light", "first"))
    grown.apply(germinate("norm", "second"))
    grown.close()
    assert list(grown.network.seeds()) == []
    assert {outcome.reason for outcome in grown.outcomes} == {"the budget ended before it was proven"}
