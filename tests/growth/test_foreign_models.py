"""Models that nobody here wrote grow as they are: slots are found, a seed enters and leaves, and their own names stay."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import foreign_models as models
import pytest
import torch
from small_growth import GATES, OPERATIONS, PLUGINS, Kernels, germinate, same, seed_of
from torch import nn
from torch.nn import functional

from esperd.declarations import resolve
from esperd.errors import InvalidSlot
from esperd.growth.alpha import cosine
from esperd.growth.flops import uncounted_modules
from esperd.growth.grower import Grower
from esperd.growth.incubation import lookahead_gradients
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork
from esperd.growth.optimizer import build_optimizer
from esperd.growth.slots import find_slots
from esperd.growth.untouched import untouched
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Growth, Optimizer
from esperd.messages.telemetry import GateEvaluated

SAMPLES = 6
BLUEPRINTS = {"cnn": "conv_light", "mlp": "mlp_residual", "transformer": "token_mlp_x2"}
IMAGES = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(models.VOCABULARY, (SAMPLES, models.CONTEXT), generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(SAMPLES) % models.CLASSES


@dataclasses.dataclass(frozen=True)
class Case:
    """A foreign model, what it takes, and the slots it has by tracing and by pattern."""

    build: Callable[[], nn.Module]
    inputs: torch.Tensor
    found: list[str]
    patterns: tuple[str, ...]
    named: list[str]


CASES = {
    "gpt2": Case(
        models.gpt2,
        TOKENS,
        ["transformer.h.0", "transformer.h.1", "transformer.h.2"],
        ("transformer.h.?", "transformer.drop", "*.mlp"),
        ["drop", "h.0.mlp", "h.0", "h.1.mlp", "h.1", "h.2.mlp", "h.2"],
    ),
    "llama": Case(
        models.llama,
        TOKENS,
        ["model.layers.0", "model.layers.1", "model.layers.2"],
        ("model.layers.[02]", "model.layers.*.q_proj"),
        ["layers.0.self_attn.q_proj", "layers.0", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj", "layers.2"],
    ),
    "resnet18": Case(
        models.resnet18,
        IMAGES,
        ["relu", "layer1", "layer2", "layer3"],  # layer4 returns 1x1
        ("layer?", "layer1.*.bn2"),
        ["layer1.0.bn2", "layer1.1.bn2", "layer1", "layer2", "layer3", "layer4"],
    ),
    "mobilenet": Case(
        models.mobilenet,
        IMAGES,
        ["blocks.0", "blocks.1", "blocks", "flatten"],
        ("blocks.?", "blocks.1.0.bn?", "blocks.1.1.se"),
        ["blocks.0", "blocks.1.0.bn1", "blocks.1.0.bn2", "blocks.1.0.bn3", "blocks.1.1.se", "blocks.1", "blocks.2"],
    ),
    "recurrent": Case(models.recurrent, TOKENS, ["relu"], ("fc1", "embedding"), ["embedding", "fc1"]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


def built(case):
    torch.manual_seed(0)
    return case.build()


def short(slots):
    return [slot.slot.removeprefix("transformer.").removeprefix("model.") for slot in slots]


def grown_in(case, alpha):
    """The model with one seed in each of its slots, and the names of the seeds."""
    host = built(case)
    network = GrowingNetwork(host, find_slots(host, case.inputs[:4], patterns=case.patterns))
    for slot in network.slots:
        network.insert(seed_of(module_for(slot), slot, alpha=alpha))
    return network


def module_for(slot):
    return resolve(PLUGINS.blueprints[BLUEPRINTS[slot.topology]].factory)(slot.shape)


def loss(output, target):
    if output.dim() == 3:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)
    return functional.cross_entropy(output, target, reduction="none")


def targets(output):
    return TOKENS if output.dim() == 3 else LABELS


def test_slots_are_found_by_tracing(case):
    slots = find_slots(built(case), case.inputs[:4])
    assert [slot.slot for slot in slots] == case.found


def test_slots_are_found_by_name_or_pattern(case):
    slots = find_slots(built(case), case.inputs[:4], patterns=case.patterns)
    assert short(slots) == case.named


def test_the_model_is_left_as_it_was_by_tracing(case):
    host = built(case)
    before, stream = copy.deepcopy(dict(host.named_buffers()) | dict(host.named_parameters())), torch.get_rng_state()
    find_slots(host, case.inputs[:4])
    assert same(dict(host.named_buffers()) | dict(host.named_parameters()), before)
    assert torch.equal(torch.get_rng_state(), stream)
    assert host.training


@pytest.mark.parametrize("training", [True, False])
def test_a_seed_at_alpha_0_leaves_outputs_to_the_bit(case, training):
    alone, network = built(case).train(training), grown_in(case, alpha=0.0).train(training)
    outputs = []
    for model in (alone, network):
        torch.manual_seed(3)
        outputs.append(model(case.inputs))
    plain = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0].logits
    assert torch.equal(plain, outputs[1])


def test_the_names_of_the_host_stay_as_they_were(case):
    alone, network = built(case), grown_in(case, alpha=0.5)
    assert list(network.host.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in network.host.named_parameters()] == [name for name, _ in alone.named_parameters()]
    network.host.load_state_dict(alone.state_dict())


def test_host_and_seeds_learn_through_each_other(case):
    network = grown_in(case, alpha=0.5).train()
    output = network(case.inputs)
    loss(output, targets(output)).mean().backward()
    for seed in network.seeds():
        gradients = [parameter.grad for parameter in seed.parameters()]
        assert any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients), seed.name
    missing = [name for name, parameter in network.host.named_parameters() if parameter.grad is None]
    assert not missing


def test_a_seed_incubates_behind_the_model_and_leaves_no_trace_in_it(case):
    network = grown_in(case, alpha=0.0).train()
    host = copy.deepcopy(network.host.state_dict())
    for seed in network.seeds():
        output = network.host.eval()(case.inputs)
        network.train()
        target = targets(output if isinstance(output, torch.Tensor) else output.logits)
        second = lookahead_gradients(network, seed, case.inputs, target, loss, alpha=1.0)
        assert any(gradient is not None and bool((gradient != 0).any()) for gradient in second.gradients)
    assert all(parameter.grad is None for parameter in network.host.parameters())
    assert same(network.host.state_dict(), host)


def test_a_deep_copy_grows_by_itself(case):
    network = grown_in(case, alpha=0.0).eval()
    plain, twin = network(case.inputs), copy.deepcopy(network)
    for seed in twin.seeds():
        seed.alpha = 1.0
        for parameter in seed.parameters():
            nn.init.normal_(parameter)
    assert not torch.equal(twin(case.inputs), plain)
    assert torch.equal(network(case.inputs), plain)


def test_what_the_model_computes_is_counted(case):
    host = built(case)
    with untouched(host):
        assert uncounted_modules(host, case.inputs) == []


def test_a_seed_is_grown_in_it_from_germination_to_blending(case):
    host = built(case)
    events = []
    grower = Grower(
        network=GrowingNetwork(host, find_slots(host, case.inputs[:4])),
        optimizer=build_optimizer(Optimizer(learning_rate=1e-2), host.parameters()),
        loss=loss,
        metric=None,
        growth=Growth(incubation="lookahead", incubation_epochs=1, blending_epochs=2),
        settings=Gates(min_gradient_ratio=0.0),
        gates=GATES,
        operations=OPERATIONS,
        curve=cosine,
        source=Kernels(),
        ledger=Ledger(),
        emit=events.append,
    )
    batch = (case.inputs, targets(grower.network.eval()(case.inputs)))
    grower.sample, grower.steps_per_epoch = batch, 8
    grower.network.train()
    slot = grower.network.slots[0]
    assert grower.apply(germinate(BLUEPRINTS[slot.topology], slot.slot)) is None
    losses = []
    for _ in range(2):
        losses += [float(grower.train_step(*batch)) for _ in range(8)]
        grower.epoch += 1
        grower.measure([batch])
        grower.end_epoch()
    assert losses[-1] < losses[0]
    (seed,) = grower.network.seeds()
    assert seed.stage is Stage.BLENDING, [event for event in events if isinstance(event, GateEvaluated)]
    assert seed.alpha > 0.0
    assert grower.ledger.spent["incubation"] > 0
    assert grower.incubator.sharing == {slot.slot: "shared"}, "second passes start at the slot"


def test_what_an_lstm_returns_is_no_slot_and_says_why():
    with pytest.raises(InvalidSlot, match=r"'lstm' \(LSTM\) cannot be a slot: it returns a tuple \(Tensor, tuple\), and"):
        find_slots(models.recurrent(), TOKENS, patterns=("lstm",))


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("gpt2", "transformer.h.0.attn", r"it returns a tuple \(Tensor, NoneType\)"),
        ("gpt2", "transformer.wpe", "does not start with the batch of 4"),
        ("gpt2", "transformer", r"it returns a BaseModelOutputWithPastAndCrossAttentions \(last_hidden_state: Tensor"),
        ("gpt2", "transformer.h", "it does not run"),
        ("llama", "model.rotary_emb", r"it returns a tuple \(Tensor, Tensor\)"),
        ("resnet18", "layer1.0.relu", "it runs 2 times"),
    ],
)
def test_what_cannot_be_a_slot_says_why(name, pattern, reason):
    case = CASES[name]
    with pytest.raises(InvalidSlot, match=reason):
        find_slots(built(case), case.inputs[:4], patterns=(pattern,))


def test_a_channels_last_model_keeps_its_layout_and_its_numbers():
    host, images = models.resnet18().to(memory_format=torch.channels_last), IMAGES.to(memory_format=torch.channels_last)
    network = GrowingNetwork(host, find_slots(host, images)).eval()
    plain = network(images)
    for slot in network.slots:
        network.insert(seed_of(module_for(slot), slot, alpha=0.0))
    assert torch.equal(network(images), plain)
