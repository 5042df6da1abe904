"""Incubation: a seed learns behind a host that cannot tell it is there."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small_growth import (
    BATCH,
    TRAIN,
    Kernels,
    batches,
    end,
    epoch,
    germinate,
    grower,
    loss,
    network,
    same,
    seed_of,
    steps,
    tensors_of,
    until,
)
from torch import nn

from esperd.builtins.seeds.cnn import conv_light
from esperd.growth.gates import Evidence, fitness
from esperd.growth.incubation import lookahead_gradients
from esperd.growth.probe import probe
from esperd.messages.growth import Stage
from esperd.messages.jobs import CoAdaptation, Gates, Optimizer

X, Y = TRAIN[0][:BATCH], TRAIN[1][:BATCH]


def host_tensors(grown):
    return {name: tensor.clone() for name, tensor in grown.network.host.state_dict().items()}


def gradients(grown):
    return {name: parameter.grad.clone() for name, parameter in grown.network.host.named_parameters()}


def host_state(grown):
    """What the optimiser remembers of the host."""
    return {name: tensor for name, tensor in tensors_of(grown).items() if re.match(r"host\.\d", name)}


class Delta(nn.Module):
    """Residual: adds what its layers make of the input."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def zero_conv():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


def probed(net, module):
    seed = seed_of(module, net.slots[0], alpha=0.0)
    net.insert(seed)
    return probe(net, seed, X, Y, loss, alpha=1.0)


OPTIMIZERS = {
    "sgd": Optimizer(name="sgd"),
    "adamw": Optimizer(name="adamw"),
    "adam-foreach-clipped": Optimizer(name="adam", implementation="foreach", max_gradient_norm=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("incubation", ["lookahead", "straight_through"])
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
def test_isolation_leaves_host_gradients_buffers_and_random_stream_to_the_bit(optimizer, incubation, operator):
    alone, growing = (
        grower(optimizer=optimizer, incubation_epochs=9, incubation=incubation, operator=operator) for _ in range(2)
    )
    for slot, blueprint in (("first", "conv_light"), ("second", "squeeze_excite")):
        assert growing.apply(germinate(blueprint, slot)) is None
    seeds = {seed.name: copy.deepcopy(seed.state_dict()) for seed in growing.network.seeds()}
    for step, (inputs, targets) in enumerate(batches(0)):
        after = []
        for grown in (alone, growing):
            torch.manual_seed(step)
            value = steps(grown, [(inputs, targets)])
            after.append((value, gradients(grown), host_tensors(grown), torch.get_rng_state()))
        (value, gradient, state, rng), (value2, gradient2, state2, rng2) = after
        assert value == value2
        assert same(gradient, gradient2)
        assert same(state, state2)
        assert torch.equal(rng, rng2)
    for seed in growing.network.seeds():
        assert seed.stage is Stage.TRAINING
        assert not same(seed.state_dict(), seeds[seed.name]), "it learned"


class Drops(nn.Module):
    """A seed that draws from the random stream and keeps statistics of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.drop(self.norm(self.module(x)) - self.norm.bias.view(1, -1, 1, 1)) * 0.1


@pytest.mark.parametrize("incubation", ["lookahead", "straight_through"])
def test_a_seed_that_draws_and_keeps_statistics_disturbs_nothing(incubation):
    alone = grower(incubation=incubation, incubation_epochs=9)
    growing = grower(incubation=incubation, incubation_epochs=9, source=Kernels(Drops, portable=False))
    growing.apply(germinate("conv_light", "first"))
    statistics = copy.deepcopy(growing.network.seed("first#0").module.norm.running_var)
    for grown in (alone, growing):
        torch.manual_seed(3)
        for index in range(2):
            steps(grown, batches(index))
    assert same(host_tensors(alone), host_tensors(growing))
    assert not torch.equal(growing.network.seed("first#0").module.norm.running_var, statistics)


@pytest.mark.parametrize("incubation", ["lookahead", "straight_through"])
def test_the_host_stays_to_the_bit_over_whole_epochs_of_incubation(incubation):
    alone, growing = (grower(incubation_epochs=3, incubation=incubation) for _ in range(2))
    growing.apply(germinate("conv_light", "first"))
    for grown in (alone, growing):
        torch.manual_seed(1)
        for _ in range(2):
            epoch(grown)
    assert same(host_tensors(alone), host_tensors(growing))
    assert alone.gate_loss == growing.gate_loss


def test_with_a_frozen_input_the_host_stands_still_and_the_seed_learns():
    grown = grower(incubation="frozen_input", incubation_epochs=2)
    torch.manual_seed(0)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    host, rng = host_tensors(grown), torch.get_rng_state()
    optimizer = host_state(grown)
    before = copy.deepcopy(grown.network.seed("first#0").state_dict())
    losses = steps(grown, batches(1))
    assert same(host, host_tensors(grown))
    assert torch.equal(rng, torch.get_rng_state())
    assert same(optimizer, host_state(grown)), "momentum does not move a host that stands still"
    seed = grown.network.seed("first#0")
    assert not same(before, seed.state_dict())
    end(grown)
    assert seed.incubation_loss == pytest.approx(sum(losses) / len(losses)), "the loss with the seed at its target"
    assert seed.gradient_ratio is None, "a host that stands still has no gradient to compare with"


def test_a_frozen_host_gives_no_ratio_and_its_seed_is_blended_in_all_the_same():
    grown = grower(incubation="frozen_input", dropout=0.0)
    torch.manual_seed(0)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    assert until(grown, "first#0", Stage.PROBATIONARY).alpha == 1.0


def test_straight_through_teaches_a_direction_without_being_heard():
    grown = grower(incubation="straight_through", incubation_epochs=2, dropout=0.0)
    torch.manual_seed(0)
    grown.apply(germinate("conv_light", "first"))
    seed = grown.network.seed("first#0")
    assert (seed.alpha, seed.presence) == (0.0, "taught")
    outputs = grown.network.eval()(X)
    with grown.network.alphas({"first#0": 0.0}):
        assert torch.equal(grown.network(X), outputs)
    epoch(grown)
    assert seed.incubation_loss is None, "the loss never sees it"
    assert seed.prospect is None, "not yet due"
    epoch(grown)
    assert seed.prospect is not None
    epoch(grown)
    assert (seed.stage, seed.presence) != (Stage.TRAINING, "taught")


@pytest.mark.parametrize("co_adapts", [True, False])
@pytest.mark.parametrize("incubation", ["lookahead", "joint"])
def test_whether_the_host_adapts_to_a_seed_it_hears_is_the_jobs_to_say(co_adapts, incubation):
    grown = grower(incubation=incubation, co_adaptation=CoAdaptation(cnn=co_adapts), dropout=0.0, blending_epochs=3)
    epoch(grown)
    grown.apply(germinate("conv_light", "second"))
    seed = until(grown, "second#0", Stage.BLENDING)
    seed.alpha = 0.5
    net = grown.network.train()
    seen = []
    handle = seed.register_forward_hook(lambda _seed, inputs, _output: seen.append(inputs[0]))
    value = loss(net(X), Y).mean()
    handle.remove()
    assert seen[0].requires_grad is co_adapts
    value.backward()
    assert all(parameter.grad is not None for parameter in net.host.second.parameters()), "it goes on learning past the seed"
    assert all(parameter.grad is not None for parameter in seed.parameters())


def test_a_host_that_does_not_adapt_hears_the_same():
    net = network(dropout=0.0).eval()
    net.insert(seed := seed_of(conv_light((4, 6, 6)), net.slots[0], alpha=0.4))
    with torch.no_grad():
        seed.module.delta[2].weight.normal_()
    heard = net(X)
    seed.isolated = True
    assert torch.equal(net(X), heard)
    seed.alpha = 1.0
    whole = net(X)
    seed.isolated = False
    assert torch.equal(net(X), whole)


def test_the_lookahead_gradient_is_that_of_the_network_with_the_seed_at_its_target():
    net = network(dropout=0.0).train()
    seed = seed_of(conv_light((4, 6, 6)), net.slots[0], alpha=0.0)
    net.insert(seed)
    second = lookahead_gradients(net, seed, X, Y, loss, alpha=0.6)
    value, found = second.loss, second.gradients
    seed.alpha = 0.6
    wanted_value = loss(net(X), Y).mean()
    wanted = torch.autograd.grad(wanted_value, list(seed.parameters()))
    assert value == wanted_value
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, wanted, strict=True))
    assert all(parameter.grad is None for parameter in net.host.parameters())


def test_a_seed_with_batch_norm_learns_its_statistics_behind_the_host():
    net = network().train()
    seed = seed_of(Delta(nn.BatchNorm2d(4), zero_conv()), net.slots[0], alpha=0.0)
    net.insert(seed)
    others = {name: tensor.clone() for name, tensor in net.host.state_dict().items()}
    lookahead_gradients(net, seed, X, Y, loss, alpha=1.0)
    assert seed.module.layers[0].num_batches_tracked == 1
    assert same(net.host.state_dict(), others)


def test_a_sound_seed_passes_its_probe_and_is_put_back():
    shape = (4, 6, 6)
    net = network().train()
    module = nn.Sequential(conv_light(shape), Delta(nn.BatchNorm2d(4), zero_conv()))
    net.insert(seed_of(conv_light(shape), net.slots[0], 7))
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    fresh = copy.deepcopy(module.state_dict())
    shown = probed(net, module)
    assert shown.tensors == shown.tensors_with_gradient_third == 6
    assert 1 <= shown.tensors_with_gradient_first < 6, "what stands before a zero layer learns a step later"
    assert shown.identity_error == 0.0
    assert (shown.shape_kept, shown.dtype_kept, shown.device_kept, shown.finite) == (True, True, True, True)
    assert same(module.state_dict(), fresh)
    assert all(parameter.grad is None for parameter in net.parameters())
    net.remove("first#0")
    assert same(net.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), rng)


class To(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.change(x * self.scale)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Delta(zero_conv(), nn.GroupNorm(2, 4, affine=False), nn.ReLU()), "no parameter receives a gradient at step 1"),
        (Delta(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Threshold(1e9, 0.0)), "no parameter receives a gradient at step 1"),
        (nn.Sequential(zero_conv(), nn.Conv2d(4, 4, 1), zero_conv(), zero_conv()), "parameter tensors learn by step 3"),
        (nn.Conv2d(4, 5, 3, padding=1), "it changes the slot's shape"),
        (nn.MaxPool2d(2), "it changes the slot's shape"),
        (To(torch.Tensor.double), "it changes the slot's dtype"),
        (To(lambda x: x * float("nan")), "its output is not finite"),
        (nn.Identity(), "it has no parameters"),
    ],
    ids=["zero-conv-norm-relu", "dead", "too-deep", "channels", "size", "dtype", "nan", "empty"],
)
def test_the_probe_shows_what_is_wrong_with_a_seed(module, reason):
    net = network().train()
    state = copy.deepcopy(module.state_dict())
    verdict = fitness(Evidence(blueprint="by_hand", slot="first", epoch=0, probe=probed(net, module)), Gates())
    assert not verdict.passed
    assert reason in verdict.reason
    assert same(module.state_dict(), state)


def test_the_probe_sees_the_slot_behind_its_older_seeds():
    net = network().train()
    net.insert(seed_of(To(lambda x: x + 100.0), net.slots[0], 1))
    seen: list[float] = []
    module = To(lambda x: seen.append(float(x.detach().min())) or x)
    net.insert(seed := seed_of(module, net.slots[0], 2, alpha=0.0))
    probe(net, seed, X, Y, loss, alpha=1.0)
    assert seen
    assert min(seen) > 90.0, "probe steps scale it, from 100"


def test_a_lookahead_pass_is_cut_at_the_seeds_input():
    net = network().train()
    cut = []
    net.insert(seed := seed_of(To(lambda x: cut.append(x.grad_fn.next_functions) or x), net.slots[1], alpha=0.0))
    lookahead_gradients(net, seed, X, Y, loss, alpha=1.0)
    (multiplication,) = cut
    assert multiplication[0][0] is None, "no way back into the host"


def test_joint_incubation_starts_at_the_target_as_the_identity_and_trains_with_the_host():
    grown = grower(incubation="joint", alpha_target=0.8, dropout=0.0)
    torch.manual_seed(0)
    epoch(grown)
    before = grown.network.eval()(X)
    grown.network.train()
    assert grown.apply(germinate("conv_light", "first")) is None
    grown.network.eval()
    seed = grown.network.seed("first#0")
    assert (seed.stage, seed.alpha) == (Stage.TRAINING, 0.8)
    assert torch.allclose(grown.network(X), before)
    assert grown.incubating() == []
    grown.network.train()
    weights = copy.deepcopy(seed.state_dict())
    epoch(grown)
    assert not same(seed.state_dict(), weights)
    assert seed.incubation_loss is None
    assert grown.ledger.spent["incubation"] == grown.ledger.cost("incubation", "probe:first#0") * BATCH, "no second pass"
    assert until(grown, "first#0", Stage.PROBATIONARY).alpha == 0.8
    assert seed.verdict.passed


def test_a_lookahead_seed_carries_the_loss_of_its_last_epochs_passes():
    grown = grower(incubation_epochs=2, dropout=0.0)
    grown.apply(germinate("conv_light", "first"))
    host = steps(grown, batches(0))
    end(grown)
    first = grown.network.seed("first#0").incubation_loss
    assert 0.0 < first < 2 * sum(host) / len(host)
    assert grown.incubator.gathered["first#0"].passes == 0, "the next epoch's mean starts anew"


def test_a_plain_module_grows_too_outside_the_daemon():
    grown = grower(source=Kernels(portable=False))
    assert grown.apply(germinate("depthwise", "second")) is None
    seed = until(grown, "second#0", Stage.PROBATIONARY)
    assert (seed.kernel, seed.graph) == (None, None)
