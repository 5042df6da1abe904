"""The plain module: equal to the network to the bit in everything, and an ordinary module to whatever looks at it."""

from __future__ import annotations

import copy
import pickle

import grown_networks
import pytest
import small_growth as small
import torch
from torch import nn

from esperd.builtins.seeds import cnn as cnn_seeds
from esperd.declarations import resolve
from esperd.errors import ExportRejected
from esperd.execution import KernelModule
from esperd.growth.grown_layer import GrownLayer
from esperd.growth.lifecycle import Life
from esperd.growth.network import GrowingNetwork, Seed, SlotPort
from esperd.growth.plain import plain_module
from esperd.growth.slots import find_slots
from esperd.messages.growth import Stage

BLUEPRINTS = small.PLUGINS.blueprints
NAMES = ("cnn", "mlp", "channels_last", "tied")
SEEDS = {"as kernels": None, "as eager modules": BLUEPRINTS}


def names_in_plain(network):
    """Every tensor of a network under the name it has in the plain module."""
    carriers = {seed.record.slot for seed in network.seeds()}
    found = {}
    for name, tensor in network.host.state_dict(keep_vars=True).items():
        (slot,) = [slot for slot in carriers if name.startswith(f"{slot}.")] or [""]
        found[f"{slot}.base_layer.{name.removeprefix(f'{slot}.')}" if slot else name] = tensor
    for seed in network.seeds():
        for name, tensor in seed.state_dict(keep_vars=True).items():
            found[f"{seed.record.slot}.seeds.{seed.name.rpartition('#')[2]}.{name}"] = tensor
    return found


def pass_of(model, x):
    torch.manual_seed(3)
    output = model(x)
    output.square().sum().backward()
    return output


# --- equal


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("blueprints", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_buffers_equal_the_networks_to_the_bit(name, blueprints, training):
    network, x = grown_networks.build(name)
    model = plain_module(network.train(training), blueprints=blueprints)
    assert all(module.training is training for module in model.modules())
    assert torch.equal(pass_of(model, x), pass_of(network, x))
    wanted, given = names_in_plain(network), model.state_dict(keep_vars=True)
    wanted.pop("alias.weight", None)  # the same layer under its other name
    assert {key for key in given if not key.startswith("alias.")} == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(given[key], tensor), key
        assert (tensor.grad is None) == (given[key].grad is None), key
        assert tensor.grad is None or torch.equal(given[key].grad, tensor.grad), key


@pytest.mark.parametrize("name", NAMES)
def test_it_shares_nothing_with_the_network_it_came_from(name):
    network, x = grown_networks.build(name)
    before = network(x)
    model = plain_module(network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(network(x), before)
    assert list(network.seeds())
    assert not torch.equal(model(x), before)


def test_parameters_shared_in_the_host_stay_shared_and_a_layer_with_two_names_is_one():
    network, _ = grown_networks.build("tied")
    model = plain_module(network)
    assert model.b.base_layer.weight is model.a.weight
    assert model.alias is model.b
    assert model.order[1] is model.b


def test_a_host_without_seeds_is_a_copy_of_the_host():
    network = small.network()
    model = plain_module(network)
    assert type(model) is small.Host
    assert small.same(model.state_dict(), network.host.state_dict())


def test_seeds_in_a_slot_within_a_slot_both_count():
    host = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2))
    x = torch.randn(4, 6)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("0", "0.0"))).eval()
    grown_networks.add_seed(network, "mlp_low_rank", "0", alpha=0.5)
    grown_networks.add_seed(network, "mlp_low_rank", "0.0")
    model = plain_module(network, x)
    assert isinstance(model[0], GrownLayer)
    assert isinstance(model[0][0], GrownLayer)
    assert torch.equal(model(x), network(x))


def test_a_seed_that_is_not_heard_is_left_out():
    network, x = grown_networks.build("cnn")
    network.seed("first#0").alpha = 0.0
    model = plain_module(network, x)
    assert type(model.first) is nn.Sequential


def test_weights_of_a_frozen_seed_stay_frozen():
    network, _ = grown_networks.build("mlp")
    for parameter in network.seed("first#1").parameters():
        parameter.requires_grad_(False)
    for blueprints in SEEDS.values():
        model = plain_module(network, blueprints=blueprints)
        assert not any(parameter.requires_grad for parameter in model.first.seeds[1].parameters())
        assert all(parameter.requires_grad for parameter in model.first.seeds[0].parameters())


def test_a_double_precision_network_is_rebuilt_in_double_precision():
    network, x = grown_networks.build("mlp")
    model = plain_module(network.double(), x.double(), blueprints=BLUEPRINTS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_the_callers_rng_stream_is_left_alone():
    network, x = grown_networks.build("cnn")
    before = torch.get_rng_state()
    plain_module(network, x, blueprints=BLUEPRINTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_is_handed_contiguous_maps_where_no_gradient_flows_as_in_the_network():
    network, x = grown_networks.build("channels_last")
    model = plain_module(network, x)
    seen = []
    model[1].seeds[0].module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.no_grad():
        model(x)
    model(x)
    assert seen == [True, False]


# --- ordinary


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_slots_hooks_and_stages_is_left(name):
    network, _ = grown_networks.build(name)
    for module in plain_module(network).modules():
        assert not module._forward_hooks
        assert not isinstance(module, (GrowingNetwork, SlotPort, Seed))


def test_with_blueprints_no_kernel_is_left_and_tools_find_layers():
    network, _ = grown_networks.build("mlp")
    assert any(isinstance(module, KernelModule) for module in plain_module(network).modules())
    model = plain_module(network, blueprints=BLUEPRINTS)
    assert not any(isinstance(module, KernelModule) for module in model.modules())
    assert [type(module) for module in model.first.seeds[1].modules()].count(nn.Linear) > 0


def test_the_host_still_finds_its_layer_and_what_is_set_there_is_set_on_it():
    network, _ = grown_networks.build("mlp")
    model = plain_module(network)
    assert model.first.weight is model.first.base_layer.weight
    assert model.first.in_features == 8
    model.first.weight = nn.Parameter(torch.zeros(6, 8))
    assert not model.first.base_layer.weight.any()
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = model.first.absent
    model.first.training = False
    assert "training" in model.first.__dict__
    model.first.note = 3
    assert not hasattr(model.first.base_layer, "note")


def test_a_sequence_stays_one_and_only_a_sequence_has_a_length():
    network, _ = grown_networks.build("cnn")
    model = plain_module(network)
    assert len(model.first) == 3
    assert [type(layer) for layer in model.first] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert type(model.first[0]) is nn.Conv2d
    assert model.get_submodule("first.0") is model.first[0]
    network, _ = grown_networks.build("mlp")
    layer = plain_module(network).first
    assert layer
    with pytest.raises(TypeError):
        len(layer)


def test_hooks_of_the_users_own_stay_and_those_behind_the_seeds_see_what_seeds_made():
    network, x = grown_networks.build("mlp")
    seen = []
    handle = network.host.head.register_forward_hook(lambda module, inputs, output: seen.append(("head", type(module))))
    network.host.first.register_forward_hook(lambda module, inputs, output: seen.append(output) or output + 1.0)
    wanted = network(x)
    model = plain_module(network)
    handle.remove()
    seen.clear()
    assert torch.equal(model(x), wanted)
    assert torch.equal(seen[0], model.first.seeds(model.first.base_layer(x)))
    assert seen[1] == ("head", nn.Linear)


@pytest.mark.parametrize("blueprints", SEEDS.values(), ids=SEEDS)
def test_it_is_copied_pickled_and_traced_as_any_module(blueprints):
    network, x = grown_networks.build("cnn")
    model = plain_module(network, blueprints=blueprints)
    wanted = network(x)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        again.first.seeds[0].module.get_parameter("delta.2.weight").add_(1.0)
    assert not torch.equal(again(x), wanted), "a pickled kernel reads the weights it was pickled with"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert torch.equal(copied(x), wanted)


def test_a_layer_with_a_way_of_its_own_to_be_copied_is_copied_with_its_seeds():
    class Careful(nn.Linear):
        def __deepcopy__(self, memo):
            copied = Careful(self.in_features, self.out_features)
            copied.load_state_dict(self.state_dict())
            return copied

    host, x = nn.Sequential(Careful(6, 6), nn.Linear(6, 2)), torch.randn(4, 6)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("0",))).eval()
    grown_networks.add_seed(network, "mlp_low_rank", "0")
    assert torch.equal(copy.deepcopy(plain_module(network))(x), network(x))


@pytest.mark.parametrize("blueprints", SEEDS.values(), ids=SEEDS)
def test_it_compiles_into_one_graph(blueprints):
    network, x = grown_networks.build("mlp")
    compiled = torch.compile(plain_module(network, blueprints=blueprints), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), network(x))


def test_it_trains_under_distributed_data_parallel(tmp_path):
    network, x = grown_networks.build("cnn")
    model = plain_module(network.train())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(pass_of(parallel, x), pass_of(network, x))
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_print_shows_every_seed_with_its_alpha():
    network, _ = grown_networks.build("cnn")
    assert "alpha=0.7" in repr(plain_module(network))


# --- refused


def test_a_seed_on_trial_does_not_leave():
    network, _ = grown_networks.build("cnn")
    network.seed("second#1").life = Life(stage=Stage.PROBATIONARY)
    with pytest.raises(ExportRejected, match="second#1 is probationary; only fossilized"):
        plain_module(network)


def test_a_host_that_cannot_be_copied_is_refused():
    network, _ = grown_networks.build("mlp")
    network.host.cached = network.host.first.weight * 2  # torch copies no tensor that has a history
    with pytest.raises(ExportRejected, match="host cannot be copied: RuntimeError"):
        plain_module(network)


def test_a_host_that_steps_around_what_was_grown_is_found_out_on_a_sample():
    network, x = grown_networks.build("fused")
    plain_module(network)
    with pytest.raises(ExportRejected, match=r"the plain module does not answer .*: at batch size 4 they differ by \d") as told:
        plain_module(network, x)
    assert told.value.fields["difference"] > 0.0


def test_a_blueprint_that_is_not_given_is_named():
    network, _ = grown_networks.build("cnn")
    given = {"conv_light": BLUEPRINTS["conv_light"]}
    with pytest.raises(ExportRejected, match=r"second#1 was grown from blueprint 'squeeze_excite'.*\(conv_light\)"):
        plain_module(network, blueprints=given)


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("test_plain:louder", r"'conv_light' builds now for seed first#0 does not answer as the network does"),
        ("test_plain:other", "first#0 cannot be rebuilt from blueprint 'conv_light': RuntimeError"),
    ],
)
def test_a_blueprint_that_has_changed_since_is_found_out(factory, told):
    network, _ = grown_networks.build("cnn")
    declared = BLUEPRINTS["conv_light"]
    changed = type(declared)(**{**vars(declared), "factory": factory})
    with pytest.raises(ExportRejected, match=told):
        plain_module(network, blueprints={**BLUEPRINTS, "conv_light": changed})


def louder(shape):
    """The seed's module, computing something else from the same weights."""
    module = resolve(BLUEPRINTS["conv_light"].factory)(shape)
    module.register_forward_hook(lambda module, inputs, output: output * 1.001)
    return module


def other(shape):
    return cnn_seeds.norm(shape)
