"""The network: a host with seeds in its slots computes what the seeds' alphas say, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from small_growth import TRAIN, host, network, same, seed_of
from torch import nn

from esperd.errors import InvalidModel, InvalidSlot
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots
from esperd.growth.untouched import untouched
from esperd.messages.growth import SlotRecord

X = TRAIN[0][:8]


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return x * self.factor


class Shift(Scale):
    def forward(self, x):
        return x + self.factor


@pytest.fixture
def net():
    return network().eval()


def test_the_host_is_used_as_it_is_and_its_parameters_keep_their_names(net):
    alone = host().eval()
    assert [name for name, _ in net.named_parameters()] == [f"host.{name}" for name, _ in alone.named_parameters()]
    assert torch.equal(net(X), alone(X))


def test_a_seed_at_alpha_0_leaves_outputs_and_gradients_to_the_bit(net):
    net.train()
    alone = host().train()
    net.insert(seed_of(Scale(float("nan")), net.slots[0], alpha=0.0))
    outputs = []
    for model in (net, alone):
        torch.manual_seed(5)
        outputs.append(model(X))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.host.parameters(), alone.parameters(), strict=True))


def test_a_seed_is_blended_into_its_slot_by_its_alpha(net):
    expected = net.host.head(net.host.second(net.host.first(X) * (0.75 + 0.25 * 3)).mean((2, 3)))
    net.insert(seed_of(Scale(3.0), net.slots[0], alpha=0.25))
    assert torch.allclose(net(X), expected)


def test_two_seeds_at_one_slot_compose_oldest_first(net):
    first = net.host.first(X)
    net.insert(seed_of(Scale(2.0), net.slots[0], 10))
    net.insert(seed_of(Shift(1.0), net.slots[0], 9))
    assert [seed.name for seed in net.seeds()] == ["first#10", "first#9"]
    assert torch.equal(net.port("first")(first), first * 2.0 + 1.0)
    assert torch.equal(net(X), net.host.head(net.host.second(first * 2.0 + 1.0).mean((2, 3))))


def test_overridden_alphas_hold_for_their_block_only_even_if_it_raises(net):
    plain = net(X)
    net.insert(seed_of(Scale(3.0), net.slots[0]))
    grown = net(X)
    with net.alphas({"first#0": 0.0}):
        assert torch.equal(net(X), plain)
    with pytest.raises(RuntimeError), net.alphas({"first#0": 0.5}, detached="first#0"):
        net(X[:, :, :0])
    assert torch.equal(net(X), grown)
    assert net.port("first").detached is None


def test_alpha_may_differ_from_sample_to_sample(net):
    plain = net(X)
    net.insert(seed_of(Scale(3.0), net.slots[0]))
    grown = net(X)
    with net.alphas({"first#0": torch.tensor([0.0, 1.0] * 4)}):
        mixed = net(X)
    assert torch.allclose(mixed[0::2], plain[0::2])
    assert torch.allclose(mixed[1::2], grown[1::2])


def test_a_deep_copy_has_slots_of_its_own(net):
    plain = net(X)
    twin = copy.deepcopy(net)
    twin.insert(seed_of(Scale(3.0), twin.slots[0]))
    assert not torch.equal(twin(X), plain)
    assert torch.equal(net(X), plain)
    again = copy.deepcopy(twin)
    again.remove("first#0")
    assert torch.equal(again(X), plain)
    assert not torch.equal(twin(X), plain)


def test_a_pass_looks_at_the_seeds_that_are_heard_and_at_no_other(net):
    port, seed = net.port("first"), seed_of(Scale(3.0), net.slots[0], alpha=0.0)
    net.insert(seed)
    assert port.heard == ()
    for alpha, heard in ((0.5, (seed,)), (1.0, (seed,)), (0.0, ())):
        seed.alpha = alpha
        assert port.heard == heard
    seed.presence = "taught"
    assert port.heard == (seed,)
    twin = copy.deepcopy(net)
    assert twin.port("first").heard == (twin.seed("first#0"),)
    twin.seed("first#0").presence = "silent"
    assert (twin.port("first").heard, port.heard) == ((), (seed,))
    net.remove("first#0").alpha = 1.0
    assert port.heard == ()


def test_removing_a_seed_gives_the_host_back(net):
    plain, parameters = net(X), net.effective_parameters
    net.insert(seed_of(Scale(3.0), net.slots[1]))
    assert net.effective_parameters == parameters + 1
    assert net.remove("second#0").name == "second#0"
    assert torch.equal(net(X), plain)
    assert list(net.seeds()) == []


def test_unknown_slots_and_seeds_are_errors_that_list_what_exists(net):
    with pytest.raises(InvalidSlot, match="slots are: first, second"):
        net.port("third")
    net.insert(seed_of(Scale(3.0), net.slots[0]))
    with pytest.raises(InvalidSlot, match=r"no seed 'first#7'.*'first#0'"):
        net.seed("first#7")
    with pytest.raises(InvalidSlot, match="no seed"):
        net.remove("second#0")
    record = SlotRecord(slot="gone", topology="cnn", shape=(1, 2, 2), dtype="float32", module="Conv2d")
    with pytest.raises(InvalidSlot, match="no module 'gone'"):
        GrowingNetwork(host(), [record])


def test_slots_may_stand_deep_in_the_host_under_any_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Linear(4, 6)
            self.update = nn.Sequential(nn.Linear(6, 5))
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.update(self.keys(x)))

    model = Attention().eval()
    x = torch.randn(3, 4)
    slots = find_slots(model, x)
    assert [slot.slot for slot in slots] == ["keys", "update"]
    net = GrowingNetwork(model, slots)
    plain = net(x)
    for slot in slots:
        net.insert(seed_of(Scale(2.0), slot))
    assert net.slots == slots
    assert [seed.name for seed in net.seeds()] == ["keys#0", "update#0"]
    assert not torch.equal(net(x), plain)
    copied = copy.deepcopy(net)
    copied.load_state_dict(net.state_dict())
    assert torch.equal(copied(x), net(x))
    net.remove("keys#0")
    net.remove("update#0")
    assert torch.equal(net(x), plain)


def test_a_host_cannot_carry_the_slots_of_two_networks():
    model = host()
    slots = find_slots(model, X, patterns=("first",))
    GrowingNetwork(model, slots)
    with pytest.raises(InvalidSlot, match="already"):
        GrowingNetwork(model, slots)


class Rebinding(nn.Module):
    """Keeps statistics as people do: by replacing the buffer, or by making it late."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.late = x.mean(0)
        return x


def test_an_untouched_pass_leaves_buffers_and_random_stream_as_they_were():
    model = nn.Sequential(Rebinding(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    x = torch.randn(8, 3)
    model[1](x)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), untouched(model):
        model(x).add_(1 / 0)
    assert same(model.state_dict(), state)
    assert model[0].late is None
    assert torch.equal(torch.get_rng_state(), rng)


def test_calling_the_network_gives_what_the_host_predicts_however_it_wraps_it():
    class Wrapped(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model = Wrapped(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    assert torch.equal(GrowingNetwork(model, find_slots(model, x))(x), model(x)["logits"])
    with pytest.raises(InvalidModel, match="returned None"):
        GrowingNetwork(Returning(None), ())(x)


class Returning(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_a_host_with_in_place_activations_trains_through_its_seeds():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    net = GrowingNetwork(model, find_slots(model, torch.randn(2, 4), patterns=("0",)))
    net.insert(seed_of(Scale(2.0), net.slots[0], alpha=0.5))
    net(torch.randn(3, 4)).sum().backward()
    assert net.seed("0#0").module.factor.grad is not None
