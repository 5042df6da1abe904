"""Compiled training passes: what they compute, how often the compiler is asked, and that nothing runs eager in silence."""

from __future__ import annotations

import copy
import gc
import weakref

import foreign_models
import pytest
import small_growth as small
import torch
import torch._inductor.config
from torch import nn

from esperd.errors import CompileUnavailable, InvalidSlot
from esperd.growth.compiled import LIMIT_OF_STRUCTURE, Compilation, Compiled, Fallback
from esperd.growth.network import GrowingNetwork
from esperd.growth.operators import operator
from esperd.growth.precision import Precision
from esperd.growth.rollback import Snapshot
from esperd.growth.slots import find_slots
from esperd.messages.growth import Stage

INDUCTOR_IMPORTS = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
INPUTS, TARGETS = small.TRAIN[0][: small.BATCH], small.TRAIN[1][: small.BATCH]


def with_seed(*, alpha: float = 0.4, entering: str = "add", isolated: bool = False) -> GrowingNetwork:
    """A network without dropout in training mode, a seed with random weights in its first slot."""
    network = small.network(dropout=0.0)
    record = network.slots[0]
    torch.manual_seed(1)
    seed = small.seed_of(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()), record, alpha=alpha)
    seed.operator, seed.operator_name, seed.isolated = operator(entering, record), entering, isolated
    seed.alpha = alpha
    network.insert(seed)
    return network.train()


def gradients(network: GrowingNetwork, output: torch.Tensor) -> dict[str, torch.Tensor]:
    small.loss(output, TARGETS).mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def compiled_grower(backend="eager", *, limit=32, dropout=0.0, **options):
    """A grower whose passes are compiled, and what it was told of them."""
    told = []
    grown = small.grower(dropout=dropout, **options)
    grown.runner = Compiled(backend, limit=limit, tell=told.append)
    return grown, told


def graphs(grown) -> int:
    return grown.runner.compilations.graphs


def reasons(told) -> list[tuple[str, str]]:
    return [(news.structure, news.reason) for news in told if isinstance(news, Fallback)]


# --- what they compute -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "backend"),
    [
        ({"alpha": 0.0}, "eager"),
        ({"alpha": 0.4}, "aot_eager"),
        ({"alpha": 0.4, "isolated": True}, "aot_eager"),
        ({"alpha": 1.0}, "eager"),
        ({"alpha": 0.4, "entering": "multiply"}, "eager"),
        ({"alpha": 0.4, "entering": "gate"}, "eager"),
    ],
    ids=["silent", "blended", "isolated", "whole", "multiply", "gate"],
)
def test_a_compiled_pass_gives_the_outputs_gradients_and_buffers_of_an_eager_one(seed, backend):
    network = with_seed(**seed)
    eager, runner = copy.deepcopy(network), Compiled(backend)
    output, wanted = runner.forward(network, "", counted=False)(INPUTS), eager(INPUTS)
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(gradients(network, output), gradients(eager, wanted), **CLOSE)
    torch.testing.assert_close(dict(network.named_buffers()), dict(eager.named_buffers()), **CLOSE)
    assert runner.compilations.graphs == 1
    assert not runner.compilations.fallbacks


@INDUCTOR_IMPORTS
def test_inductor_gives_the_outputs_and_gradients_of_an_eager_pass():
    host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, small.CLASSES))
    network = GrowingNetwork(host, find_slots(host, INPUTS.mean((1, 2)), patterns=("1",)))
    network.insert(small.seed_of(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), network.slots[0], alpha=0.3))
    inputs, eager = INPUTS.mean((1, 2)), copy.deepcopy(network)  # (B, 6)
    runner = Compiled()
    output, wanted = runner.forward(network.train(), "", counted=False)(inputs), eager(inputs)
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(gradients(network, output), gradients(eager, wanted), **CLOSE)
    assert runner.compilations.graphs == 1


def test_channels_last_stays_channels_last():
    network = with_seed().to(memory_format=torch.channels_last)
    inputs, runner = INPUTS.expand(-1, 1, -1, -1).to(memory_format=torch.channels_last), Compiled("aot_eager")
    eager = copy.deepcopy(network)
    seen = []
    network.host.second.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    output, wanted = runner.forward(network, "", counted=False)(inputs), eager(inputs)
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(gradients(network, output), gradients(eager, wanted), **CLOSE)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not runner.compilations.fallbacks


def test_a_residual_block_that_works_in_place_computes_the_same():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(1, 4, 3), foreign_models.BasicBlock(4, 4), nn.Flatten(), nn.Linear(64, small.CLASSES))
    network = GrowingNetwork(host, find_slots(host, INPUTS, patterns=("0",)))
    network.insert(small.seed_of(nn.Conv2d(4, 4, 3, padding=1), network.slots[0], alpha=0.5))
    eager, runner = copy.deepcopy(network.train()), Compiled("aot_eager")
    output, wanted = runner.forward(network, "", counted=False)(INPUTS), eager(INPUTS)
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(gradients(network, output), gradients(eager, wanted), **CLOSE)
    assert not runner.compilations.fallbacks


@pytest.mark.parametrize(("precision", "backend"), [("float32", "eager"), ("bfloat16", "aot_eager")])
def test_training_with_dropout_and_clipping_follows_the_eager_training_in_every_precision(precision, backend):
    ends = []
    for runner in (None, Compiled(backend)):
        grown = small.grower(dropout=0.2)
        grown.precision, grown.max_gradient_norm = Precision(precision), 0.5
        grown.runner = runner or grown.runner
        torch.manual_seed(3)
        ends.append(small.steps(grown, small.batches(0) + small.batches(1)))
    assert ends[1] == pytest.approx(ends[0], rel=1e-3 if precision == "float32" else 3e-2)


def test_the_pass_whose_flops_are_counted_runs_as_without_compiling():
    (compiled, _), plain = compiled_grower(), small.grower(dropout=0.0)
    for grown in (compiled, plain):
        small.steps(grown, small.batches(0)[:1])
    assert compiled.ledger.costs == plain.ledger.costs
    assert graphs(compiled) == 0


def test_the_host_trains_to_the_bit_as_without_the_seed_that_learns_behind_it():
    (alone, _), (beside, _) = compiled_grower(), compiled_grower()
    assert beside.apply(small.germinate("conv_light", "first")) is None
    small.steps(alone, small.batches(0))
    small.steps(beside, small.batches(0))
    assert small.same(alone.network.host.state_dict(), beside.network.host.state_dict())
    assert beside.network.seed("first#0").stage is Stage.TRAINING
    assert graphs(beside) == graphs(alone) == 1


def test_a_shape_the_seeds_were_not_grown_for_is_refused_as_in_an_eager_pass():
    network = with_seed()
    with pytest.raises(InvalidSlot, match="one size"):
        Compiled("eager").forward(network, "", counted=False)(torch.randn(4, 1, 8, 8))


# --- how often the compiler is asked -----------------------------------------------------------------------------------------


def test_a_seeds_whole_life_takes_three_graphs_and_its_end_none():
    grown, told = compiled_grower(settings=small.Gates(min_contribution=1e9), probation_epochs=1, incubation="lookahead")
    small.epoch(grown)
    assert grown.apply(small.germinate("conv_light", "first")) is None
    small.until(grown, "first#0", Stage.EMBARGOED)
    small.epoch(grown)
    assert [news.structure for news in told] == ["host", "first#0 blended", "first#0 whole"]
    assert all(isinstance(news, Compilation) and news.graphs == 1 and news.seconds > 0.0 for news in told)
    found = grown.runner.compilations
    assert (found.structures, found.graphs, found.fallbacks) == (3, 3, ())
    assert found.seconds == pytest.approx(sum(news.seconds for news in told))


def test_alpha_moves_at_every_step_without_a_further_graph():
    network, runner = with_seed(alpha=0.1), Compiled("eager")
    eager = copy.deepcopy(network)
    for alpha in (0.1, 0.25, 0.5, 0.99):
        for net in (network, eager):
            net.seed("first#0").alpha = alpha
        assert torch.equal(runner.forward(network, "", counted=False)(INPUTS), eager(INPUTS))
    assert runner.compilations.graphs == 1


def test_every_batch_size_is_served_by_three_graphs():
    network, runner = with_seed(), Compiled("eager")
    counts = []
    for size in (64, 31, 16, 50, 15, 2, 7, 1, 64, 8, 1):
        assert len(runner.forward(network, "", counted=False)(small.TRAIN[0][:size])) == size
        counts.append(runner.compilations.graphs)
    assert counts == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # torch takes other convolutions below 16 samples, and for a single one
    assert runner.compilations.structures == 1


def test_a_grower_that_was_rolled_back_goes_on_to_the_bit_with_the_programs_it_had():
    grown, _ = compiled_grower(incubation="joint")
    assert grown.apply(small.germinate("conv_light", "first")) is None
    small.steps(grown, small.batches(0))
    snapshot = Snapshot.take(grown, None)
    losses = small.steps(grown, small.batches(1))
    grown.network.seed("first#0").alpha = 0.5
    small.steps(grown, small.batches(2))
    compiled = graphs(grown)
    snapshot.restore_into(grown)
    assert small.steps(grown, small.batches(1)) == losses
    assert graphs(grown) == compiled


def test_what_was_compiled_goes_with_the_seed_and_with_the_network():
    made = []

    def backend(graph, _examples):
        made.append(weakref.ref(graph))
        return graph.forward

    network, runner = with_seed(), Compiled(backend)
    runner.forward(network, "", counted=False)(INPUTS)
    network.remove("first#0")
    runner.forward(network, "", counted=False)(INPUTS)
    gc.collect()
    _, with_a_seed, alone = made
    assert with_a_seed() is None
    assert alone() is not None
    of_the_network = weakref.ref(network)
    del network, runner
    gc.collect()
    assert of_the_network() is None


# --- where passes run eager --------------------------------------------------------------------------------------------------


def test_at_its_limit_it_says_so_and_training_goes_on():
    grown, told = compiled_grower(limit=1, incubation="joint")
    small.epoch(grown)
    assert grown.apply(small.germinate("conv_light", "first")) is None
    losses = small.steps(grown, small.batches(1) + small.batches(2))
    assert graphs(grown) == 1
    assert reasons(told) == [("first#0 whole", "1 graphs were compiled, more may not be")]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_at_its_limit_what_was_compiled_goes_on():
    network, told = with_seed(), []
    runner = Compiled("eager", limit=1, tell=told.append)
    for alpha in (0.4, 1.0, 0.4):
        network.seed("first#0").alpha = alpha
        forward = runner.forward(network, "", counted=False)
        forward(INPUTS)
        assert (forward is network) == (alpha == 1.0)
    assert len(reasons(told)) == 1


def test_a_seed_taught_straight_through_runs_eager_and_is_told():
    grown, told = compiled_grower(incubation="straight_through")
    assert grown.apply(small.germinate("conv_light", "first")) is None
    small.steps(grown, small.batches(0))
    ((structure, reason),) = reasons(told)
    assert structure == "first#0 taught"
    assert "straight-through" in reason
    assert graphs(grown) == 0


class Peeking(nn.Module):
    """Looks at a number in the middle of its pass."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        x = self.head(x)
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_host_that_cannot_be_one_graph_runs_eager_once_and_is_told():
    torch.manual_seed(0)
    network, told = GrowingNetwork(Peeking(), ()).train(), []
    eager, runner = copy.deepcopy(network), Compiled("aot_eager", tell=told.append)
    for _ in range(2):
        assert torch.equal(runner.forward(network, "", counted=False)(INPUTS), eager(INPUTS))
    assert small.same(network.state_dict(), eager.state_dict())  # running statistics moved once a pass
    ((structure, reason),) = reasons(told)
    assert structure == "host"
    assert "ata-dependent" in reason
    assert (runner.compilations.structures, runner.compilations.fallbacks) == (0, tuple(told))


class Counting(nn.Module):
    """Counts its passes in a plain number and computes with it."""

    def __init__(self):
        super().__init__()
        self.head, self.passes = nn.Linear(6, 2), 0

    def forward(self, x):
        self.passes += 1
        return self.head(x) * self.passes


def test_a_host_that_asks_for_a_graph_at_every_step_runs_eager_after_a_few():
    network, told = GrowingNetwork(Counting(), ()).train(), []
    runner, inputs = Compiled("eager", tell=told.append), torch.randn(4, 6)
    for step in range(1, 9):
        output = runner.forward(network, "", counted=False)(inputs)
        assert torch.equal(output, network.host.head(inputs) * step)
    assert runner.compilations.graphs <= LIMIT_OF_STRUCTURE
    ((_, reason),) = reasons(told)
    assert str(LIMIT_OF_STRUCTURE) in reason


# --- where nothing can be compiled -------------------------------------------------------------------------------------------


@INDUCTOR_IMPORTS
def test_without_a_cpp_compiler_there_is_one_clear_error_at_the_start():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(CompileUnavailable) as caught:
        Compiled()
    assert "no-such-compiler" in caught.value.message
    assert "g++" in caught.value.message
    assert caught.value.fields == {"backend": "inductor", "device": "cpu"}


def test_a_backend_that_does_not_exist_is_refused_at_the_start():
    with pytest.raises(CompileUnavailable, match="'nonesuch'"):
        Compiled("nonesuch")


def test_a_torch_compile_that_is_switched_off_is_refused_at_the_start():
    with torch._dynamo.config.patch(disable=True), pytest.raises(CompileUnavailable, match="compil"):
        Compiled("eager")
