"""A job's host: built the same again, or refused before anything is trained."""

from __future__ import annotations

import functools
import random

import desks
import numpy as np
import pytest
import torch
from torch import nn

from esperd.errors import InvalidModel
from esperd.messages.jobs import Budget, Job
from esperd.trainer import host as hosts
from esperd.trainer.checkpoint import _foreign_streams, restore_rng, seed_rng


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))


@functools.cache
def cached():
    return small()


def unseeded():
    model = small()
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(4, 64)).astype("float32")))
    return model


def drawn_by_numpy():
    model = small()
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(np.random.normal(size=(4, 64)).astype("float32")) * random.random())
    return model


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def elementwise():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 64))

        def forward(self, x):
            return (x.flatten(1)[:, None] * self.weight).sum(-1)

    return Scale()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x, mask, *others, scale, bias=None, **more):
        return self.head(x.flatten(1))


def attending():
    return Attending()


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.host = wrap, small()

    def forward(self, x, mask=None):
        return self.wrap(self.host(x))


def wrapped():
    return Wrapped(lambda logits: {"logits": logits, "hidden": ()})


def paired():
    return Wrapped(lambda logits: (logits, None))


def factory(function, **changes):
    job = Job(host=f"{__name__}:{function.__name__}", data="digits", budget=Budget(epochs=1), **changes)
    return hosts.HostFactory(job, desks.PLUGINS, torch.device("cpu"))


def test_a_factory_that_returns_one_module_twice_cannot_have_a_control():
    built = factory(cached, control=True)
    first = built.build()
    with pytest.raises(InvalidModel, match="the very module"):
        built.build()
    assert first is cached()


def test_a_factory_that_draws_other_weights_the_second_time_cannot_have_a_control():
    built = factory(unseeded, control=True)
    built.build()
    with pytest.raises(InvalidModel, match="other weights"):
        built.build()


def test_weights_drawn_by_numpy_and_random_come_back_the_same():
    built = factory(drawn_by_numpy, control=True)
    first, second = built.build().state_dict(), built.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_lazy_module_is_refused_by_name():
    with pytest.raises(InvalidModel, match=r"'1.weight'"):
        factory(lazy).build()


def test_a_model_that_needs_several_inputs_is_refused_by_their_names():
    with pytest.raises(InvalidModel, match=r"needs 3 inputs \(x, mask, scale\), and a batch is one tensor"):
        factory(attending).build()


def test_what_a_host_predicts_may_be_called_logits():
    built = factory(wrapped)
    assert built.output(built.build(), torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_host_that_returns_a_pair_is_refused_by_what_came():
    built = factory(paired)
    with pytest.raises(InvalidModel, match=r"returned a tuple \(Tensor, NoneType\)"):
        built.output(built.build(), torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("changes", [{"control": True}, {}])
def test_uncounted_flops_are_refused_where_they_decide_something(changes):
    built = factory(elementwise, **changes)
    host, inputs = built.build(), torch.rand(2, 1, 8, 8)
    if changes:
        with pytest.raises(InvalidModel, match="not counted"):
            built.flops(host, inputs)
    else:
        assert built.flops(host, inputs) == 0.0


def test_every_rng_stream_goes_on_where_the_checkpoint_left_it():
    seed_rng(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    streams = {**_foreign_streams(), "cpu": torch.get_rng_state()}
    expected = (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item())
    seed_rng(4)
    restore_rng(streams)
    assert (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()) == expected
