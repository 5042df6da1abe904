"""Attribution: networks whose loss is known for every set of seeds, so that what is told of each seed can be checked."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
import torch
from small_growth import GATE, TRAIN, digits, network, same, seed_of
from small_growth import loss as cross_entropy
from torch import nn

from esperd.errors import InvalidSlot
from esperd.growth.attribution import PERMUTATION_PAIRS, attribute
from esperd.growth.coalitions import coalition
from esperd.growth.contribution import fuses, measure
from esperd.growth.flops import count_flops
from esperd.growth.interval import mean_interval
from esperd.growth.network import GrowingNetwork
from esperd.growth.shapley import exact_values, order_pairs, prefixes
from esperd.messages.growth import Attribution, SlotRecord

SAMPLES = 40
HOST_FLOPS = 2.0
"""A linear layer 1 → 1."""


class Bit(nn.Module):
    """Adds a power of two: the host's output tells which seeds are on. Each costs differently much."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.costly = nn.Linear(1, index + 1, bias=False)

    def forward(self, x):
        return x + 2**self.index + 0 * self.costly(x).sum(1, keepdim=True)


class Game:
    """A network of n seeds whose loss is any function of which of them are on, and passes counted.

    ``value(on)`` is the mean loss with the seeds of these indices on; each sample is off it by its target.
    """

    def __init__(self, count, value):
        host = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False))
        nn.init.ones_(host[1].weight)
        slot = SlotRecord(slot="0", topology="mlp", shape=(1,), dtype="float32", module="Identity")
        self.net = GrowingNetwork(host, [slot])
        self.names = tuple(f"0#{index}" for index in range(count))
        for index in range(count):
            self.net.insert(seed_of(Bit(index), slot, index))
        self.value = value
        self.table = torch.tensor(
            [value({i for i in range(count) if on >> i & 1}) for on in range(2**count)], dtype=torch.float32
        )
        targets = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
        targets -= targets.mean()
        self.batches = [(torch.zeros(25, 1), targets[:25]), (torch.zeros(15, 1), targets[25:])]
        self.sizes = []
        host.register_forward_pre_hook(lambda _module, inputs: self.sizes.append(len(inputs[0])))

    def loss(self, output, target):
        return self.table[output[:, 0].round().long()] * (1 + 0.1 * target) + target

    def gain(self, *on):
        return self.value(set()) - self.value(set(on))

    def gains(self):
        everybody = [
            set(on) for size in range(len(self.names) + 1) for on in itertools.combinations(range(len(self.names)), size)
        ]
        return {frozenset(self.names[i] for i in on): self.gain(*on) for on in everybody}

    def cost_of(self, running):
        return HOST_FLOPS + sum(2.0 * (int(name.removeprefix("0#")) + 1) for name in running)

    def attribute(self, seeds=None, **options):
        settings = {"cost_of": self.cost_of, "flops_cap": math.inf, "epoch": 7, "confidence": 0.9}
        chosen = dict.fromkeys(self.names, 1.0) if seeds is None else seeds
        return attribute(self.net, self.batches, self.loss, chosen, **{**settings, **options})

    @property
    def passes(self):
        """Passes of the whole split."""
        return sum(self.sizes) / SAMPLES


def random_game(count, seed=0):
    values = torch.randn(2**count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Game(count, lambda on: values[sum(2**i for i in on)])


def approx(values):
    return pytest.approx(values, abs=1e-5)


def shapley(found):
    return {seed.seed: seed.shapley for seed in found.seeds}


def interactions(found):
    return {(each.first, each.second): each.value for each in found.interactions}


# --- seeds whose effect is known ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_additive_seeds_bring_alone_what_they_bring_together(fused):
    worth = (0.5, -0.25, 1.0)
    game = Game(3, lambda on: 3.0 - sum(worth[i] for i in on))
    found = game.attribute(fused=fused)
    assert [seed.solo.loss for seed in found.seeds] == approx(worth)
    assert [seed.leave_one_out.loss for seed in found.seeds] == approx(worth)
    assert [seed.shapley for seed in found.seeds] == approx(worth)
    assert interactions(found) == {pair: approx(0.0) for pair in itertools.combinations(game.names, 2)}
    assert (found.loss_all_off, found.loss_all_on) == (approx(3.0), approx(1.75))
    assert (found.exact, found.permutations, found.not_measured) == (True, 0, ())
    assert (found.epoch, found.samples) == (7, SAMPLES)


def test_seeds_that_bring_the_same_interact_negatively_and_share_it():
    found = Game(2, lambda on: 1.0 - bool(on)).attribute()
    assert [seed.solo.loss for seed in found.seeds] == approx([1.0, 1.0])
    assert [seed.leave_one_out.loss for seed in found.seeds] == approx([0.0, 0.0]), "either is dispensable"
    assert interactions(found) == {("0#0", "0#1"): approx(-1.0)}
    assert shapley(found) == approx({"0#0": 0.5, "0#1": 0.5})


def test_seeds_that_only_help_together_interact_positively():
    found = Game(2, lambda on: 1.0 - (len(on) == 2)).attribute()
    assert [seed.solo.loss for seed in found.seeds] == approx([0.0, 0.0])
    assert [seed.leave_one_out.loss for seed in found.seeds] == approx([1.0, 1.0]), "neither is dispensable"
    assert interactions(found) == {("0#0", "0#1"): approx(1.0)}
    assert shapley(found) == approx({"0#0": 0.5, "0#1": 0.5})


def test_seeds_that_help_alone_and_harm_together_cancel():
    found = Game(2, lambda on: 1.0 - (len(on) == 1)).attribute()
    assert [seed.solo.loss for seed in found.seeds] == approx([1.0, 1.0])
    assert [seed.leave_one_out.loss for seed in found.seeds] == approx([-1.0, -1.0])
    assert interactions(found) == {("0#0", "0#1"): approx(-2.0)}
    assert shapley(found) == approx({"0#0": 0.0, "0#1": 0.0})


def test_a_single_seed_brings_its_contribution_whichever_way_it_is_told():
    found = Game(1, lambda on: 2.0 - 0.5 * len(on)).attribute()
    (seed,) = found.seeds
    assert seed.solo == seed.leave_one_out
    assert (seed.solo.loss, seed.shapley, seed.shapley_error) == (approx(0.5), approx(0.5), 0.0)
    assert (found.coalitions, found.interactions) == (2, ())


def test_no_seeds_is_the_network_as_it_is():
    game = Game(1, lambda on: 2.0 - 0.5 * len(on))
    found = game.attribute(seeds={})
    assert found.loss_all_on == found.loss_all_off == approx(1.5)
    assert (found.seeds, found.coalitions, found.not_measured) == ((), 1, ())


def test_a_seed_that_is_not_listed_stays_as_it_is():
    game = random_game(3)
    listed = {"0#0": 1.0, "0#2": 1.0}
    found = game.attribute(seeds=listed)
    assert found.loss_all_off == approx(game.value({1}))
    game.net.seed("0#1").alpha = 0.0
    assert game.attribute(seeds=listed).loss_all_off == approx(game.value(set()))


def test_a_seed_is_on_at_the_alpha_it_is_given_and_not_at_its_own():
    net = Game(1, lambda on: 0.0).net
    net.seed("0#0").alpha = 0.0
    game = Game(1, lambda on: 0.0)
    found = attribute(
        net, game.batches, lambda output, target: output[:, 0], {"0#0": 0.25},
        cost_of=game.cost_of, flops_cap=math.inf, epoch=0, confidence=0.9,
    )  # fmt: skip
    assert (found.loss_all_off, found.loss_all_on) == (0.0, 0.25)
    assert found.seeds[0].alpha == 0.25


def test_intervals_are_paired_by_sample():
    game = random_game(3)
    everyone = dict.fromkeys(game.names, 1.0)
    variants = {"without": coalition(everyone, game.names[1:]), "alone": coalition(everyone, game.names[:1])}
    measured = measure(game.net, game.batches, game.loss, variants={**variants, "none": coalition(everyone, ())})
    without, alone, none = (measured.variants[name][0] for name in ("without", "alone", "none"))
    for options in ({}, {"interval": "bootstrap", "rng_seed": 3}):
        seed = game.attribute(**options).seeds[0]
        method = (options.get("interval", "t"), options.get("rng_seed", 0))
        for found, differences in ((seed.leave_one_out, without - measured.loss), (seed.solo, none - alone)):
            assert (found.loss, found.lower, found.upper) == mean_interval(differences, 0.9, *method)
            assert found.lower < found.loss < found.upper
            assert (found.samples, found.epoch, found.confidence) == (SAMPLES, 7, 0.9)


# --- Shapley values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_up_to_four_seeds_every_coalition_is_measured_once_and_no_other(count):
    game = random_game(count)
    found = game.attribute()
    assert game.passes == found.coalitions == 2**count
    assert found.exact
    assert shapley(found) == approx(exact_values(game.names, game.gains()))
    assert {seed.shapley_error for seed in found.seeds} == {0.0}


@pytest.mark.parametrize("count", [5, 6])
def test_of_five_and_six_seeds_every_coalition_is_measured_if_all_fit_the_cap(count):
    game = random_game(count)
    found = game.attribute()
    assert game.passes == found.coalitions == 2**count
    assert (found.exact, found.permutations) == (True, 0)
    assert shapley(found) == approx(exact_values(game.names, game.gains()))
    cut = random_game(count).attribute(flops_cap=found.flops - 1)
    assert (cut.exact, cut.permutations > 0) == (False, True)


def test_of_many_seeds_the_values_come_with_an_error_and_add_up_all_the_same():
    game = random_game(8)
    found = game.attribute(rng_seed=1)
    assert (found.exact, found.permutations, found.not_measured) == (False, 2 * PERMUTATION_PAIRS, ())
    assert 8 + 8 + 28 < game.passes == found.coalitions < 256
    truth = exact_values(game.names, game.gains())
    for seed in found.seeds:
        assert seed.shapley_error > 0.0
        assert abs(seed.shapley - truth[seed.seed]) < 4 * seed.shapley_error
    assert sum(shapley(found).values()) == pytest.approx(found.loss_all_off - found.loss_all_on, abs=1e-9)


def test_an_attribution_is_drawn_from_its_seed_and_nothing_else():
    games = [(random_game(8), seed) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    first, again, other = (game.attribute(rng_seed=seed, interval="bootstrap") for game, seed in games)
    assert first == again
    assert shapley(first) != shapley(other)
    assert first.seeds[0].solo.lower != other.seeds[0].solo.lower
    assert torch.equal(torch.get_rng_state(), before)


# --- what it costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [2048, 60])
@pytest.mark.parametrize("fused", [True, False])
def test_every_pass_is_charged_to_the_flop(fused, largest):
    game = random_game(6)
    found, counted = count_flops(lambda: game.attribute(fused=fused, largest_pass=largest))
    assert found.flops == counted > 0.0


@pytest.mark.parametrize("fused", [True, False])
def test_no_cap_is_ever_exceeded_and_whatever_it_cut_is_said(fused):
    whole = random_game(6).attribute(fused=fused)
    for share in (0.0, 0.01, 0.02, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 1.0):
        game, cap = random_game(6), share * whole.flops
        found, counted = count_flops(lambda game=game, cap=cap: game.attribute(fused=fused, flops_cap=cap))
        assert found.flops == counted <= cap
        said = dict(line.split(": ") for line in found.not_measured)
        assert set(said.values()) <= {"the FLOPs cap"}
        assert (found.loss_all_on is None) == ("loss with all on" in said)
        assert (found.loss_all_off is None) == ("loss with all off" in said)
        for seed in found.seeds:
            assert (seed.leave_one_out is None) == (f"{seed.seed} left out" in said)
            assert (seed.solo is None) == (f"{seed.seed} alone" in said)
            assert (seed.shapley is None) == (found.exact is None) == ("Shapley values" in said)
        for pair in itertools.combinations(game.names, 2):
            assert (pair in interactions(found)) != (" with ".join(pair) in said)
        cut = [what for what in said if what.endswith("pairs of orders for Shapley values")]
        assert bool(cut) == (found.exact is False and found.permutations < 2 * PERMUTATION_PAIRS)
        if cut:
            assert cut == [
                f"{PERMUTATION_PAIRS - found.permutations // 2} of {PERMUTATION_PAIRS} pairs of orders for Shapley values"
            ]


def test_a_cap_of_nothing_measures_nothing_and_guesses_nothing():
    game = random_game(2)
    found = game.attribute(flops_cap=0.0)
    assert (game.passes, found.coalitions, found.flops) == (0, 0, 0.0)
    assert (found.loss_all_on, found.loss_all_off, found.exact, found.interactions) == (None, None, None, ())
    for seed in found.seeds:
        assert (seed.leave_one_out, seed.solo, seed.shapley, seed.shapley_error) == (None, None, None, None)
    assert len(found.not_measured) == 2 + 2 * 2 + 1 + 1


def test_what_a_cap_leaves_is_what_it_would_have_been():
    whole = random_game(6).attribute()
    cut = random_game(6).attribute(flops_cap=0.3 * whole.flops)
    assert 0 < len(cut.interactions) < len(whole.interactions)
    assert interactions(cut).items() < interactions(whole).items()
    assert [seed.solo for seed in cut.seeds] == [seed.solo for seed in whole.seeds]


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8])
def test_orders_are_sampled_whole_until_the_cap_and_still_add_up(share):
    game = random_game(8)
    found = game.attribute(flops_cap=share * random_game(8).attribute().flops, rng_seed=0)
    assert 4 <= found.permutations < 2 * PERMUTATION_PAIRS
    assert sum(shapley(found).values()) == pytest.approx(found.loss_all_off - found.loss_all_on, abs=1e-9)
    pairs = itertools.islice(order_pairs(game.names, 0), found.permutations // 2)
    sampled = {on for pair in pairs for order in pair for on in prefixes(order)}
    before = {on for on in game.gains() if len(on) <= 2 or len(on) >= 7}
    assert game.passes == found.coalitions == len(sampled | before), "no pass was spent on an order that did not fit"


def test_a_cap_that_is_just_enough_is_enough():
    whole = random_game(6).attribute()
    assert random_game(6).attribute(flops_cap=whole.flops) == whole


# --- whatever the passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [30, 100, 10**6])
def test_stacked_passes_tell_what_separate_ones_tell(largest):
    separate = random_game(6)
    stacked = random_game(6)
    found, expected = stacked.attribute(fused=True, largest_pass=largest), separate.attribute()
    assert shapley(found) == approx(shapley(expected))
    assert interactions(found) == approx(interactions(expected))
    assert (found.coalitions, found.not_measured) == (expected.coalitions, expected.not_measured)
    assert max(stacked.sizes) <= largest
    assert len(stacked.sizes) < len(separate.sizes) or largest == 30


@pytest.mark.parametrize("fused", [True, False])
def test_a_network_in_training_is_left_to_the_bit(fused):
    net = network().train()
    net.host.first.eval()  # frozen statistics, as people do
    torch.manual_seed(4)
    convolutions = [nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))]
    for index, (slot, module) in enumerate(zip(net.slots, convolutions, strict=True)):
        net.insert(seed_of(module, slot, index, alpha=0.5))
    net.train()
    net.host.first.eval()
    seeds = {"first#0": 1.0, "second#1": 0.5}
    cross_entropy(net(TRAIN[0]), TRAIN[1]).mean().backward()
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    rng = torch.get_rng_state()
    assert fuses(net, GATE, cross_entropy, {"all": coalition(seeds, seeds), "none": coalition(seeds, ())})
    options = {"cost_of": lambda running: 1.0, "flops_cap": math.inf, "epoch": 1, "confidence": 0.95}
    first, second = (attribute(net, [GATE, digits(5)], cross_entropy, seeds, fused=fused, **options) for _ in range(2))
    assert first == second
    assert first.samples == 128
    assert [module.training for module in net.modules()] == modes
    assert same(dict(net.state_dict()), state)
    assert same({name: parameter.grad for name, parameter in net.named_parameters()}, gradients)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [seed.alpha for seed in net.seeds()] == [0.5, 0.5]


# --- at its limits -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_said_and_spoils_only_what_is_made_of_it():
    game = Game(3, lambda on: math.inf if on == {2} else 1.0 - 0.1 * len(on))
    found = game.attribute()
    assert [seed.solo is None for seed in found.seeds] == [False, False, True]
    assert [seed.leave_one_out.loss for seed in found.seeds] == approx([0.1] * 3)
    assert interactions(found) == {("0#0", "0#1"): approx(0.0)}
    assert (found.exact, set(shapley(found).values())) == (None, {None})
    assert found.not_measured == (
        "0#2 alone: a loss is not finite",
        "0#0 with 0#2: a loss is not finite",
        "0#1 with 0#2: a loss is not finite",
        "Shapley values: a loss is not finite",
    )


def test_no_order_is_sampled_after_a_loss_that_is_not_finite():
    game = Game(7, lambda on: math.nan if on == {2} else 1.0)
    game.attribute()
    assert game.passes == 2 + 7 + 7 + 21


def test_a_seed_that_is_not_there_is_refused():
    with pytest.raises(InvalidSlot, match="there is no seed '0#9'"):
        random_game(2).attribute(seeds={"0#0": 1.0, "0#9": 1.0}, flops_cap=0.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.1, math.nan])
def test_a_seed_that_is_on_is_heard(alpha):
    with pytest.raises(ValueError, match=r"seed '0#1' has alpha .* where it is on; it must be above 0 and at most 1"):
        random_game(2).attribute(seeds={"0#0": 1.0, "0#1": alpha})


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
@pytest.mark.parametrize("cap", [math.inf, 2e4, 0.0])
def test_an_attribution_survives_a_report(codec, cap):
    found = random_game(5).attribute(flops_cap=cap)
    assert codec.decode(codec.encode(found), type=Attribution) == found
