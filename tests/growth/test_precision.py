"""Mixed precision: passes run in it, gradients come back in their size, and an isolated seed cannot cost the host a step."""

from __future__ import annotations

import pytest
import torch
from small_growth import TRAIN, batches, epoch, germinate, grower, same, seed_of, steps, tensors_of, until
from torch import nn

from esperd.growth import incubation
from esperd.growth.incubation import SecondPass, lookahead_gradients
from esperd.growth.precision import Precision
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Optimizer


def in_precision(name: str, **options):
    grown = grower(optimizer=Optimizer(name="sgd", learning_rate=0.05), dropout=0.0, **options)
    grown.precision = grown.incubator.precision = Precision(name)
    return grown


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_seed_lives_through_its_stages_in_mixed_precision(name):
    grown = in_precision(name)
    torch.manual_seed(0)
    epoch(grown)
    assert grown.apply(germinate("conv_light", "first")) is None
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    assert all(parameter.dtype is torch.float32 for parameter in grown.network.parameters())
    assert seed.prospect is not None
    assert grown.incubator.sharing["first"] in ("shared", "copied")


def test_passes_run_in_the_precision_that_was_asked_for():
    seen = []
    grown = in_precision("bfloat16")
    grown.network.host.second[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    steps(grown, batches(0)[:1])
    assert seen == [torch.bfloat16]


def test_the_scaler_brings_gradients_back_to_their_size_before_anybody_looks():
    grown, plain = in_precision("float16", incubation_epochs=9), in_precision("float32", incubation_epochs=9)
    for each in (grown, plain):
        each.apply(germinate("conv_light", "first"))
        torch.manual_seed(0)
        steps(each, batches(0))
    assert grown.precision.scaler.get_scale() > 1.0
    ratios = [each.incubator.health(each.network.seed("first#0")).ratio for each in (grown, plain)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.2)
    weights = [each.network.host.head.weight for each in (grown, plain)]
    torch.testing.assert_close(*weights, rtol=0.05, atol=0.01)


class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + (self.weight - 1) * 1e38 * (1 + x.abs())


def test_a_gradient_that_overflows_behind_the_host_costs_the_host_no_step():
    alone, growing = in_precision("float16", incubation_epochs=9), in_precision("float16", incubation_epochs=9)
    growing.apply(germinate("conv_light", "first"))
    growing.network.seed("first#0").module = Overflows()
    growing.optimizer.param_groups[1]["params"] = list(growing.network.seed("first#0").parameters())
    for grown in (alone, growing):
        torch.manual_seed(0)
        steps(grown, batches(0))
    host = [{name: value for name, value in tensors_of(grown).items() if name.startswith("host.")} for grown in (alone, growing)]
    assert same(*host)


def test_the_scaler_goes_on_from_where_it_was_saved():
    first, second = Precision("float16"), Precision("float16")
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    second.restore(first.state())
    assert second.state() == (512.0, 7)
    assert Precision("bfloat16").state() is None
    Precision("bfloat16").restore((2.0, 1))
    untouched = Precision("float16")
    untouched.restore(None)
    assert untouched.state() == Precision("float16").state()


def test_a_seed_answers_in_the_dtype_of_its_slot():
    grown = in_precision("bfloat16")
    grown.network.insert(seed_of(nn.Conv2d(4, 4, 3, padding=1), grown.network.slots[0], alpha=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grown.network(TRAIN[0][:2]).isfinite().all()


def test_a_gradient_that_overflows_at_every_step_is_seen_although_the_scaler_never_meets_it(monkeypatch):
    def overflowing(*args, **options):
        second = lookahead_gradients(*args, **options)
        return SecondPass(second.loss, (torch.full_like(second.gradients[0], torch.inf), *second.gradients[1:]))

    shares = []
    monkeypatch.setattr(incubation, "lookahead_gradients", overflowing)
    for name in ("float32", "float16"):
        grown = in_precision(name, incubation_epochs=9)
        epoch(grown)
        assert grown.apply(germinate("conv_light", "first")) is None
        steps(grown, batches(1))
        shares.append(grown.incubator.health(grown.network.seed("first#0")).exploded_share)
        assert all(torch.isfinite(parameter).all() for parameter in grown.network.host.parameters())
    assert min(shares) > Gates().max_exploded_share
