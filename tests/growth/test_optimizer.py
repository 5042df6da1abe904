"""The optimiser through surgery: what stays is left alone to the bit, what leaves is forgotten."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from esperd.errors import CheckpointRejected, InvalidModel, InvalidOptimizer
from esperd.growth.optimizer import add_group, build_optimizer, clip_gradients, remove_group, set_learning_rate
from esperd.growth.optimizer_state import GroupState, describe, put, stays_on_cpu
from esperd.messages.jobs import Optimizer

SETTINGS = [
    Optimizer(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
    Optimizer(name="adamw", learning_rate=0.01, weight_decay=0.1),
    Optimizer(name="adam", learning_rate=0.01, weight_decay=0.0, implementation="foreach"),
    Optimizer(name="adamw", learning_rate=0.01, implementation="fused"),
    Optimizer(name="sgd", learning_rate=0.1, nesterov=True, implementation="single"),
    Optimizer(name=f"{__name__}:rmsprop", learning_rate=0.01, options={"momentum": 0.5}),
]
NAMES = ["sgd", "adamw", "adam-foreach", "adamw-fused", "sgd-nesterov-single", "users-own"]
both = pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)


def rmsprop(groups, **options):
    return torch.optim.RMSprop(groups, **options)


def parameters(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(count)]


def step(optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["name"] == "host":
                parameter.grad = torch.randn(3, generator=generator)
            else:
                parameter.grad = torch.ones(3)
    optimizer.step()


def state(optimizer, chosen):
    return [
        {key: torch.as_tensor(value).clone() for key, value in optimizer.state[parameter].items() if value is not None}
        for parameter in chosen
    ]


@both
def test_groups_that_come_and_go_leave_the_host_to_the_bit(settings):
    undisturbed, host = parameters(2, 0), parameters(2, 0)
    reference, optimizer = build_optimizer(settings, undisturbed), build_optimizer(settings, host)
    for number in range(8):
        if number == 2:
            add_group(optimizer, "a#0", parameters(2, 1), 1.0)
        if number == 3:
            add_group(optimizer, "b#1", parameters(1, 2), 0.5)
        if number == 5:
            remove_group(optimizer, "a#0")
        step(reference, number)
        step(optimizer, number)
        assert all(torch.equal(a, b) for a, b in zip(undisturbed, host, strict=True))
        for ours, theirs in zip(state(optimizer, host), state(reference, undisturbed), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@both
def test_removing_one_seed_leaves_the_state_of_another_to_the_bit(settings):
    optimizer = build_optimizer(settings, parameters(1, 0))
    kept, gone = parameters(2, 1), parameters(2, 2)
    add_group(optimizer, "gone#0", gone, 1.0)
    add_group(optimizer, "kept#1", kept, 1.0)
    step(optimizer, 0)
    before = state(optimizer, kept)
    remove_group(optimizer, "gone#0")
    assert all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in zip(state(optimizer, kept), before, strict=True)
    )


@both
def test_a_removed_group_leaves_nothing_behind(settings):
    optimizer = build_optimizer(settings, parameters(2, 0))
    gone = parameters(2, 1)
    add_group(optimizer, "gone#0", gone, 1.0)
    step(optimizer, 0)
    groups = optimizer.param_groups
    remove_group(optimizer, "gone#0")
    assert [group["name"] for group in optimizer.param_groups] == ["host"]
    assert optimizer.param_groups is groups, "schedulers hold on to the list"
    assert not any(parameter in optimizer.state for parameter in gone)
    values = [parameter.detach().clone() for parameter in gone]
    step(optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(gone, values, strict=True))
    remove_group(optimizer, "gone#0")


@both
def test_a_groups_rate_follows_the_hosts_by_its_scale_from_its_first_step(settings):
    optimizer = build_optimizer(settings, parameters(1, 0))
    set_learning_rate(optimizer, 0.4, 0)
    add_group(optimizer, "a#0", parameters(1, 1), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]
    set_learning_rate(optimizer, 0.2, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]


def test_settings_reach_the_optimizer():
    sgd, adamw, adam, fused, single, own = (build_optimizer(settings, parameters(1, 0)) for settings in SETTINGS)
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.01)
    group = adamw.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    assert type(adam) is torch.optim.Adam
    assert adam.param_groups[0]["foreach"]
    assert fused.param_groups[0]["fused"]
    assert single.param_groups[0]["nesterov"]
    assert not single.param_groups[0]["foreach"]
    assert own.param_groups[0]["momentum"] == 0.5


def test_a_new_group_warms_up_by_itself_while_the_others_go_on():
    optimizer = build_optimizer(SETTINGS[0], parameters(1, 0))
    add_group(optimizer, "a#0", parameters(1, 1), 0.5, born=10, warmup=3)
    seen = []
    for done in range(10, 16):
        set_learning_rate(optimizer, 0.4, done)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert [host for host, _ in seen] == [0.4] * 6
    assert [seed for _, seed in seen] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_gradients_are_clipped_group_by_group():
    host, seed = parameters(1, 0), parameters(2, 1)
    optimizer = build_optimizer(SETTINGS[0], host)
    add_group(optimizer, "a#0", seed, 1.0)
    host[0].grad, seed[0].grad, seed[1].grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 0.1]), torch.zeros(3)
    clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(host[0].grad, torch.tensor([0.6, 0.8, 0.0]))
    torch.testing.assert_close(seed[0].grad, torch.tensor([0.0, 0.0, 0.1]))


def lbfgs(groups, **options):
    return torch.optim.LBFGS(groups, **options)


class Remembers(torch.optim.SGD):
    """Keeps the last gradients in a list, which no checkpoint of tensors and numbers holds."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [parameter.grad]


class Global(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.state["everything"] = 1


class OnItself(torch.optim.SGD):
    """Counts its steps on itself; where nothing was counted yet, it begins at nothing."""

    def step(self, closure=None):
        self.taken = getattr(self, "taken", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / self.taken)


class OnItselfFromTheBeginning(OnItself):
    """As people write it: a copy by torch's own rules has no such attribute."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self.taken = 0

    def step(self, closure=None):
        self.taken = self.taken  # a copy raises here
        super().step()


class CopiesItself(OnItself):
    """What it keeps on itself goes into a copy, and into no checkpoint."""

    def __getstate__(self):
        return dict(vars(self))


class Caches(torch.optim.SGD):
    """Works from a cache on itself once there is one: a rollback changes what it was made from."""

    def step(self, closure=None):
        if not hasattr(self, "cache"):
            self.cache = {}
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                held = self.state[parameter]
                taken = self.cache.get((group["name"], index), held.get("taken", 0)) + 1
                held["taken"] = self.cache[group["name"], index] = taken
                parameter.data.sub_(parameter.grad, alpha=group["lr"] / taken)


class Flat(torch.optim.SGD):
    """Makes one group of whatever it is given."""

    def __init__(self, groups, **options):
        super().__init__([parameter for group in groups for parameter in group["params"]], **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lbfgs", "LBFGS"),
        ("Remembers", "keeps 'history' that is no tensor or number"),
        ("Global", "keeps state that belongs to no parameter"),
        ("OnItself", r"trains on otherwise in a fork.*differ by up to.*keeps 'taken' on itself"),
        ("OnItselfFromTheBeginning", r"cannot go on in a fork.*AttributeError.*keeps 'taken' on itself"),
        ("CopiesItself", r"trains on otherwise when it is resumed from a checkpoint.*'taken' on itself"),
        ("Caches", r"trains on otherwise after a rollback.*'cache' on itself"),
        ("Flat", "does not keep the parameter groups"),
        ("parameters", "raised TypeError"),
        ("Optimizer", "raised TypeError"),
        ("step", "raised TypeError"),
    ],
)
def test_an_optimizer_that_cannot_be_carried_through_growth_is_refused_with_the_reason(name, reason):
    with pytest.raises(InvalidOptimizer, match=reason):
        build_optimizer(Optimizer(name=f"{__name__}:{name}"), parameters(1, 0))


class Counts(torch.optim.Optimizer):
    """Keeps plain values of every kind in its groups, as schedule-free ones do, and by parameter."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "k": 0, "weights": (1, 0.5), "best": float("inf"), "mode": "train"})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["best"] = min(group["best"], 1 / group["k"])
            assert isinstance(group["weights"], tuple)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                held = self.state[parameter]
                if not held:
                    held.update(taken=0, momentum=None, ready=False)
                held["taken"] += 1
                held["ready"] = held["taken"] > 3
                assert held["ready"] in (True, False), "a float would be a lie"
                bin(held["taken"])
                if held["momentum"] is None and held["ready"]:
                    held["momentum"] = torch.zeros_like(parameter)
                if held["momentum"] is not None:
                    held["momentum"].lerp_(parameter.grad, 0.1)
                    parameter.sub_(held["momentum"], alpha=group["lr"])
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["best"] * group["weights"][1] / held["taken"])


class Draws(torch.optim.SGD):
    """Draws random numbers, as one that rounds stochastically does."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.randn(parameter.shape), alpha=1e-3)


@pytest.mark.parametrize("name", ["Counts", "Draws", "rmsprop"])
def test_an_optimizer_of_ones_own_that_can_be_carried_is_taken_and_no_stream_moves(name):
    before = torch.get_rng_state()
    assert build_optimizer(Optimizer(name=f"{__name__}:{name}"), parameters(1, 0)).param_groups[0]["name"] == "host"
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_and_state_come_back_from_a_file_with_value_and_type():
    settings, host = Optimizer(name=f"{__name__}:Counts", learning_rate=0.1), parameters(2, 0)
    optimizer = build_optimizer(settings, host)
    step(optimizer, 0)
    optimizer.state[host[0]]["history"] = [1, (2.0, None), {"a": True}]
    groups, tensors = describe(optimizer)
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(groups), type=tuple[GroupState, ...])
    again = build_optimizer(settings, parameters(2, 0))
    put(again, read, tensors)
    ours, theirs = again.param_groups[0], optimizer.param_groups[0]
    assert {**ours, "params": None} == {**theirs, "params": None}
    assert repr([*again.state.values()]) == repr([*optimizer.state.values()])


def test_what_was_taken_of_other_parameters_is_refused():
    groups, tensors = describe(build_optimizer(SETTINGS[0], parameters(2, 0)))
    with pytest.raises(CheckpointRejected, match=r"it has host of 2 tensors; this one host of 1 tensors"):
        put(build_optimizer(SETTINGS[0], parameters(1, 0)), groups, tensors)


def test_a_tensor_that_is_missing_is_named():
    optimizer = build_optimizer(SETTINGS[0], parameters(1, 0))
    step(optimizer, 0)
    with pytest.raises(CheckpointRejected, match=r"lacks the optimiser's tensor optimizer\.host\.0\.momentum_buffer"):
        put(optimizer, describe(optimizer)[0], {})


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("key", "tensor", "parameter", "group", "stays"),
    [
        ("exp_avg", GPU, GPU, {}, False),
        ("step", CPU, GPU, {"fused": None}, True),
        ("step", GPU, GPU, {"fused": True}, False),
        ("step", GPU, GPU, {"capturable": True}, False),
        ("counts", CPU, GPU, {}, True),
        ("exp_avg", CPU, CPU, {}, False),
        ("step", CPU, CPU, {"fused": False, "capturable": False}, True),
        ("step", CPU, CPU, {"fused": True}, False),
    ],
)
def test_a_tensor_of_the_state_goes_back_to_where_it_lay(key, tensor, parameter, group, stays):
    assert stays_on_cpu(key, tensor, parameter, group) is stays


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(InvalidOptimizer, match=r"returned list, not a torch\.optim\.Optimizer"):
        build_optimizer(Optimizer(name=f"{__name__}:listed"), parameters(1, 0))


def listed(groups, lr):
    return list(groups)


@pytest.mark.parametrize("name", ["adamx", "os.system", ":x", "a:b:c"])
def test_a_name_that_is_neither_known_nor_a_reference_is_refused_with_the_job(name):
    with pytest.raises(msgspec.ValidationError, match=r"matching regex.*optimizer\.name|matching regex"):
        msgspec.convert({"name": name}, type=Optimizer)


def test_frozen_parameters_are_left_out_and_a_frozen_host_is_refused():
    chosen = parameters(2, 0)
    chosen[0].requires_grad_(False)
    optimizer = build_optimizer(SETTINGS[0], chosen)
    assert optimizer.param_groups[0]["params"] == [chosen[1]]
    with pytest.raises(InvalidModel, match="nothing to train"):
        build_optimizer(SETTINGS[0], chosen[:1])
