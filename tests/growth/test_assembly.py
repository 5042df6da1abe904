"""A grower made by hand, in a notebook: what is wrong is told at once, by its name, with what is wanted."""

from __future__ import annotations

import pytest
import torch
from small_growth import CLASSES, GATE, TRAIN, accuracy, host, loss
from torch import nn
from torch.nn import functional

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.errors import InvalidData, InvalidJob, InvalidModel, InvalidOptimizer, InvalidSlot
from esperd.growth import BlueprintSource, GrowingNetwork, assemble, find_slots
from esperd.messages.jobs import CoAdaptation, Gates, Growth, Optimizer, Thresholds
from esperd.messages.policy import Arm, Decision

BATCH = TRAIN[0][:16], TRAIN[1][:16]


def assembled(**options):
    built = host()
    network = GrowingNetwork(built, find_slots(built, TRAIN[0][:4], patterns=("first", "second")))
    grower = assemble(network, BlueprintSource(BLUEPRINTS), **{"loss": loss, "steps_per_epoch": 4, **options})
    grower.sample = BATCH
    network.train()
    return grower


# --- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told", "key"),
    [
        (
            {"growth": Growth(incubation="lookahed")},
            r"growth=Growth\(incubation='lookahed'\): invalid enum value.*'lookahead', 'straight_through'",
            "growth.incubation",
        ),
        ({"growth": Growth(alpha_target=7.0)}, r"Growth\(alpha_target=7\.0\): expected `float` <= 1\.0", "growth.alpha_target"),
        ({"growth": Growth(co_adaptation=CoAdaptation(cnn=3))}, r"at co_adaptation\.cnn", "growth.co_adaptation.cnn"),
        ({"growth": Gates()}, r"growth is a Gates; it takes Growth\(\.\.\.\)", "growth"),
        ({"growth": {"incubation": "joint"}}, r"growth is a dict; it takes Growth", "growth"),
        ({"settings": Gates(confidence=95)}, r"settings=Gates\(confidence=95\)", "settings.confidence"),
        (
            {"settings": Gates(topologies={"cnn": Thresholds(max_loss_drift=-1.0)})},
            "expected `float` > 0",
            "settings.topologies[...].max_loss_drift",
        ),
        ({"optimizer": Optimizer(name="adamm")}, r"optimizer=Optimizer\(name='adamm'\)", "optimizer.name"),
        ({"optimizer": Optimizer(learning_rate="3e-3")}, r"learning_rate='3e-3'\): expected `float`", "optimizer.learning_rate"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0", "steps_per_epoch"),
    ],
)
def test_a_mistyped_setting_is_named_with_its_value(options, told, key):
    with pytest.raises(InvalidJob, match=told) as caught:
        assembled(**options)
    assert caught.value.fields["key"] == key


def test_settings_that_are_right_arrive_as_they_were_given():
    growth, gates = Growth(incubation="lookahead", incubation_epochs=2), Gates(confidence=0.9)
    grower = assembled(growth=growth, settings=gates, optimizer=Optimizer(name="sgd", learning_rate=0.5))
    assert (grower.growth, grower.settings, grower.host_learning_rate()) == (growth, gates, 0.5)


def shrinking(groups, lr, by):
    return torch.optim.SGD(groups, lr=by(lr))


def test_an_optimizer_of_ones_own_may_be_given_what_no_file_could_hold():
    settings = Optimizer(name=f"{__name__}:shrinking", learning_rate=0.5, options={"by": lambda rate: rate / 2})
    assert assembled(optimizer=settings).host_learning_rate() == 0.25


def test_an_optimizer_in_place_of_its_settings_is_refused_with_what_to_write():
    with pytest.raises(InvalidOptimizer, match=r"given a Adam; give settings: Optimizer\(name='adam'"):
        assembled(optimizer=torch.optim.Adam(host().parameters()))


# --- one value per sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incubation", ["joint", "lookahead", "frozen_input"])
@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (functional.cross_entropy, r"shape \(16,\), not \(\) torch\.float32.*reduction=\"none\""),
        (lambda output, target: functional.one_hot(target, CLASSES) * output, rf"not \(16, {CLASSES}\)"),
        (lambda output, target: loss(output, target).tolist(), "not a list"),
    ],
)
def test_a_loss_that_is_not_per_sample_is_refused_at_the_first_step(wrong, came, incubation):
    with pytest.raises(InvalidModel, match=f"the loss must return one floating-point value per sample, .*{came}"):
        assembled(loss=wrong, growth=Growth(incubation=incubation)).train_step(*BATCH)


def test_a_loss_that_ceases_to_be_per_sample_behind_the_host_is_refused():
    grower = assembled(growth=Growth(incubation="frozen_input"))
    grower.train_step(*BATCH)
    assert grower.apply(Decision(action="germinate", arm=Arm(slot="first", blueprint="norm"), reason="a test")) is None
    grower.incubator.loss = functional.cross_entropy
    with pytest.raises(InvalidModel, match="the loss must return one floating-point value per sample"):
        grower.train_step(*BATCH)


@pytest.mark.parametrize(
    ("metric", "came"),
    [
        (lambda output, target: accuracy(output, target).mean(), r"shape \(64,\), not \(\) torch\.float32"),
        (lambda output, target: output.argmax(1) == target, r".*not \(64,\) torch\.bool.*\.float\(\)"),
    ],
)
def test_a_metric_that_is_not_per_sample_is_refused_at_the_first_measuring(metric, came):
    grower = assembled(metric=metric)
    grower.train_step(*BATCH)
    with pytest.raises(InvalidModel, match=f"the metric must return one floating-point value per sample, {came}"):
        grower.measure([GATE])


# --- hosts and samples ------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = host()

    def forward(self, x, mask):
        return self.inner(x) * mask


@pytest.mark.parametrize(
    ("built", "batch", "error", "told"),
    [
        (TwoInputs(), TRAIN[0][:4], InvalidModel, r"TwoInputs does not run on a batch \(4, 1, 6, 6\) torch\.float32.*'mask'"),
        (host(), TRAIN[0][0], InvalidModel, r"Host does not run on a batch \(1, 6, 6\).*first axis of which is the batch"),
        (host(), TRAIN[0][:4].numpy(), InvalidData, "not a ndarray; torch.from_numpy"),
        (host(), TRAIN[0][:0], InvalidData, r"not a Tensor of shape \(0, 1, 6, 6\)"),
        (loss, TRAIN[0][:4], InvalidModel, "not a function"),
    ],
)
def test_a_host_that_does_not_run_on_its_samples_is_told_with_what_was_tried(built, batch, error, told):
    with pytest.raises(error, match=told):
        find_slots(built, batch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patterns": "first"}, r"patterns is the text 'first'.*give patterns=\('first',\)"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": -1}, "limit is -1"),
    ],
)
def test_patterns_and_limits_that_mean_something_else_are_refused(options, told):
    with pytest.raises(InvalidSlot, match=told):
        find_slots(host(), TRAIN[0][:4], **options)


def compiled_in_place():
    built = host()
    built.second.compile(backend="eager")
    return built


HOSTS = {
    "compiled": lambda: torch.compile(host(), backend="eager"),
    "a part is compiled": lambda: nn.Sequential(torch.compile(host(), backend="eager")),
    "a part is compiled in place": compiled_in_place,
    "traced": lambda: torch.jit.trace(host().eval(), TRAIN[0][:4]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("kind", HOSTS)
def test_a_host_that_cannot_be_looked_into_is_refused_with_what_to_do_instead(kind):
    built, slots = HOSTS[kind](), find_slots(host(), TRAIN[0][:4])
    instead = r"(traced by torch\.jit|under torch\.compile already).*compile = true in a job, runner=Compiled\(\)"
    with pytest.raises(InvalidModel, match=instead):
        find_slots(built, TRAIN[0][:4])
    with pytest.raises(InvalidModel, match=instead):
        GrowingNetwork(built, slots)
