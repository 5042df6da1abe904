"""The grower: a seed's whole life in order, every event told, and training that ends before numbers turn to nonsense."""

from __future__ import annotations

import math

import pytest
import torch
from small_growth import BATCH, GATE, SAMPLES, batches, end, epoch, germinate, grower, loss, same, steps, tensors_of, until

from esperd.errors import InvalidSlot, NotTraining, RanksDisagree, TrainingDiverged
from esperd.growth.alpha import cosine
from esperd.growth.contribution import measure
from esperd.growth.optimizer import set_learning_rate
from esperd.growth.ranks import Alone
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates
from esperd.messages.policy import Decision
from esperd.messages.telemetry import ContributionMeasured, GateEvaluated, ProspectMeasured, StageChanged


def told(event):
    match event:
        case StageChanged():
            return str(event.after)
        case GateEvaluated():
            return f"{event.verdict.gate} {'passed' if event.verdict.passed else 'refused'}"
        case ContributionMeasured():
            return "contribution"
        case ProspectMeasured():
            return "prospect"
    raise AssertionError(event)


def test_a_seed_lives_through_its_stages_and_every_step_is_told():
    events = []
    grown = grower(events, dropout=0.0, incubation_epochs=2, blending_epochs=1, shadowing_epochs=1)
    torch.manual_seed(0)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    epoch(grown)
    assert grown.apply(Decision(action="fossilize", seed="first#0", reason="proven")) is None
    assert [told(event) for event in events] == [
        *("G0 passed", "germinated", "G1 passed", "training"),
        *("prospect", "G2 passed", "blending"),
        *("G3 passed", "shadowing"),
        *("G4 passed", "probationary"),
        "contribution",
        *("G5 passed", "fossilized"),
    ]
    assert seed.contribution.lower > 0.0
    assert [event.epoch for event in events if isinstance(event, StageChanged)] == [1, 1, 3, 4, 5, 6]


def test_alpha_climbs_step_by_step_and_stands_when_blending_ends():
    grown = grower(incubation_epochs=1, blending_epochs=2, alpha_target=0.6)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.BLENDING)
    assert seed.alpha == 0.0
    seen = []
    for _ in range(2):
        for batch in batches(grown.epoch):
            steps(grown, [batch])
            seen.append(seed.alpha)
        end(grown)
    total = 2 * SAMPLES // BATCH
    assert seen[:-1] == [0.6 * cosine(step / total) for step in range(1, total)]
    assert seen[-1] == 0.6
    assert seed.stage is Stage.SHADOWING


def test_a_seed_that_would_raise_the_loss_is_not_blended_in():
    grown = grower(incubation_epochs=1, learning_rate_scale=1e4, settings=Gates(max_exploded_share=1.0))
    epoch(grown)
    grown.apply(germinate("conv_light", "second"))  # no BatchNorm behind it to scale it down again
    for _ in range(2):
        epoch(grown)
    outcome = grown.outcomes[0]
    assert outcome.stage is Stage.CULLED
    assert outcome.reason.startswith("G2: switched on it would raise the loss by")


def test_a_step_in_eval_mode_is_refused_before_anything_moved():
    grown = grower()
    grown.network.eval()
    weights = tensors_of(grown)
    with pytest.raises(NotTraining, match=r"train_step was called on a network in eval mode; call network\.train\(\) first"):
        grown.train_step(*grown.sample)
    assert grown.step == 0
    assert same(weights, tensors_of(grown))


def test_a_slot_whose_tensor_changes_shape_between_batches_is_named_as_soon_as_a_seed_is_heard_there():
    grown = grower(incubation="joint", dropout=0.0)
    epoch(grown)
    grown.network(torch.randn(2, 1, 8, 8))
    grown.apply(germinate("conv_light", "first"))
    with pytest.raises(
        InvalidSlot, match=r"slot 'first' has shape \(4, 8, 8\) for one sample, its seeds were grown for \(4, 6, 6\)"
    ):
        grown.network(torch.randn(2, 1, 8, 8))


def test_seeds_that_take_part_in_a_pass_name_its_structure():
    grown = grower(incubation="joint")
    assert grown.structure() == "host"
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    grown.apply(germinate("norm", "second"))
    assert grown.structure() == "first#0,second#1"


def test_a_gate_loss_that_is_not_finite_ends_the_training():
    grown = grower()
    epoch(grown)
    with torch.no_grad():
        grown.network.host.head.bias[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="the gate loss is nan after epoch 1; lower"):
        grown.measure([GATE])


def test_a_seed_warms_up_in_a_loop_that_never_sets_a_rate():
    grown = grower(incubation="joint", warmup_epochs=0.75, incubation_epochs=9, learning_rate_scale=0.5)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    seen = []
    for batch in batches(1) + batches(2):
        steps(grown, [batch])
        seen.append([group["lr"] for group in grown.optimizer.param_groups])
    assert seen == [[0.02, 0.02 * 0.5 * min(1.0, share / 4)] for share in range(1, 9)]


@pytest.mark.parametrize("incubation", ["joint", "lookahead", "frozen_input"])
def test_setting_the_rate_at_every_step_or_only_the_hosts_is_the_same_to_the_bit(incubation):
    def trained(set_rate):
        grown = grower(incubation=incubation, warmup_epochs=1.5, incubation_epochs=9, learning_rate_scale=0.3)
        torch.manual_seed(3)
        epoch(grown)
        grown.apply(germinate("conv_light", "first"))
        for index, batch in enumerate(batches(1) + batches(2)):
            set_rate(grown, 0.02 * 0.9**index)
            steps(grown, [batch])
        return tensors_of(grown)

    def the_hosts(grown, rate):
        grown.optimizer.param_groups[0]["lr"] = rate

    assert same(trained(lambda grown, rate: set_learning_rate(grown.optimizer, rate, grown.step)), trained(the_hosts))


SCHEDULERS = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda taken: 0.9**taken),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=24),
    "chain": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_of_torch_leads_host_and_seeds_from_a_stand_in(kind):
    """As docs/growth.md shows it: torch's schedulers count groups when they are made, and seeds come later."""

    def stand_in():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.02)

    alone, leader = stand_in(), stand_in()
    expected, schedule = SCHEDULERS[kind](alone), SCHEDULERS[kind](leader)
    grown = grower(incubation="joint", incubation_epochs=9, learning_rate_scale=0.5)
    for index in range(20):
        set_learning_rate(grown.optimizer, leader.param_groups[0]["lr"], grown.step)
        steps(grown, [batches(index)[0]])
        leader.step()
        schedule.step()
        wanted = alone.param_groups[0]["lr"]
        assert [group["lr"] for group in grown.optimizer.param_groups] == ([wanted, wanted * 0.5] if index > 4 else [wanted])
        alone.step()
        expected.step()
        if index == 4:
            end(grown)
            assert grown.apply(germinate("conv_light", "first")) is None


def test_the_hosts_learning_rate_can_be_read_back():
    grown = grower()
    set_learning_rate(grown.optimizer, 0.125, 0)
    assert grown.host_learning_rate() == 0.125
    assert grown.host_parameters == sum(parameter.numel() for parameter in grown.network.host.parameters())


def test_a_gate_loss_of_an_earlier_decision_point_proves_nothing():
    grown = grower(incubation="joint", shadowing_epochs=2)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.SHADOWING)
    for _ in range(3):
        steps(grown, batches(grown.epoch))
        grown.epoch += 1
        grown.end_epoch()
    seed = grown.network.seed("first#0")
    assert seed.stage is Stage.SHADOWING
    assert seed.verdict.reason == "the gate loss was not measured over the window"


def test_while_the_host_stands_still_no_time_passes_for_a_seed_that_it_hears():
    grown = grower(incubation="frozen_input", incubation_epochs=2)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    heard = until(grown, "first#0", Stage.BLENDING)
    steps(grown, batches(7)[:1])
    alpha = heard.alpha
    grown.apply(germinate("squeeze_excite", "second"))
    epoch(grown)
    epoch(grown)
    assert (heard.stage, heard.alpha) == (Stage.BLENDING, alpha)
    epoch(grown)
    assert heard.alpha > alpha


def test_a_seed_gone_wrong_behind_the_host_does_not_reach_the_loss_of_the_network_as_it_is():
    grown = grower(dropout=0.0, incubation_epochs=2, settings=Gates(min_gradient_ratio=9.9))
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    epoch(grown)
    epoch(grown)
    assert grown.gate_pass.fused, "its passes are stacked"
    seed = grown.network.seed("first#0")
    assert seed.stage is Stage.TRAINING, "G2 refused, it gets as long again"
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.fill_(math.nan)
    grown.epoch += 1
    measured = grown.measure([GATE])
    assert measured.mean_loss == pytest.approx(measure(grown.network, [GATE], loss).mean_loss, rel=1e-5)
    assert math.isnan(seed.prospect.loss)


def test_a_seed_whose_time_is_up_is_not_measured_once_more():
    grown = grower(incubation="joint", probation_epochs=2)
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    measured = []
    while seed.stage is Stage.PROBATIONARY:
        epoch(grown)
        measured.append(seed.contribution.epoch)
    assert len(set(measured)) == 2, "the third decision point culls it for timeout"


class Elsewhere(Alone):
    """One of two ranks; the other was given another gate split."""

    size = 2

    def agree(self, what, value):
        raise RanksDisagree(f"{what}: {value}")


def test_ranks_agree_on_the_gate_split_before_any_measures_a_part_of_it():
    grown = grower()
    grown.gate_pass.ranks = Elsewhere()
    with pytest.raises(RanksDisagree, match=rf"the gate split: \({SAMPLES}, '[0-9a-f]+'\)"):
        grown.gate_pass.run([GATE], "host", {}, 0)
