"""Built-in hosts, data sets and schedules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from esperd.builtins.datasets import esperd_datasets
from esperd.builtins.hosts import esperd_hosts
from esperd.builtins.networks.cnn import cnn
from esperd.builtins.networks.mlp import mlp
from esperd.builtins.networks.transformer import transformer
from esperd.declarations import resolve
from esperd.errors import InvalidModel, MissingExtra
from esperd.growth.slots import find_slots


def test_cnn_maps_images_to_logits_and_names_its_stages():
    host = cnn(channels=(4, 8, 8), in_channels=3, classes=5)

    assert host(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert {"features.stage1", "features.stage2", "features.stage3"} <= dict(host.named_modules()).keys()


def test_mlp_flattens_any_input():
    host = mlp(in_features=64, hidden=(16,), classes=3)

    assert host(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert host(torch.zeros(2, 64)).shape == (2, 3)


def test_host_options_from_a_job_file_are_lists():
    assert cnn(channels=[2, 3])(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (cnn, {"channels": ()}),
        (cnn, {"channels": "8"}),
        (cnn, {"channels": (8, 0)}),
        (cnn, {"in_channels": 1.5}),
        (cnn, {"classes": True}),
        (mlp, {"hidden": []}),
        (mlp, {"hidden": 32}),
        (mlp, {"in_features": -1}),
        (transformer, {"vocabulary": 0}),
        (transformer, {"depth": "4"}),
        (transformer, {"heads": 5}),
        (transformer, {"dropout": 1.0}),
        (transformer, {"dropout": True}),
    ],
)
def test_a_wrong_host_option_is_named(build, options):
    with pytest.raises(InvalidModel, match=next(iter(options))):
        build(**options)


def small_transformer(**options):
    return transformer(**{"vocabulary": 11, "context": 6, "width": 8, "depth": 2, "heads": 2, **options})


def test_transformer_maps_tokens_to_logits_and_names_its_blocks():
    host = small_transformer()

    assert host(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 11)
    assert {"blocks.1", "blocks.2"} <= dict(host.named_modules()).keys()
    assert [(slot.slot, slot.shape) for slot in find_slots(host, torch.randint(11, (4, 6)))] == [
        ("blocks.1", (6, 8)),
        ("blocks.2", (6, 8)),
    ]


def test_transformer_sees_only_what_stands_before():
    host, ids = small_transformer(depth=3).eval(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = ids.clone()
    changed[0, 3:] += 1

    before, after = host(ids), host(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_transformer_learns_with_dropout_and_answers_without_it():
    host, ids = small_transformer(dropout=0.5), torch.randint(11, (2, 6))

    assert not torch.equal(host(ids), host(ids))
    assert torch.equal(host.eval()(ids), host(ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), "7 tokens are longer than the context 6"),
        (torch.zeros(2, 6), "takes \\(B, T\\) token ids"),
        (torch.zeros(2, 1, 6, dtype=torch.int64), "takes \\(B, T\\) token ids"),
    ],
)
def test_transformer_refuses_what_are_no_tokens_of_its_context(ids, message):
    with pytest.raises(InvalidModel, match=message):
        small_transformer()(ids)


def test_the_default_transformer_has_the_parameters_it_is_documented_with():
    count = sum(parameter.numel() for parameter in transformer().parameters())
    assert f"{count:,} parameters" in transformer.__doc__


def test_every_declared_host_and_data_set_resolves():
    assert all(callable(resolve(host.factory)) for host in esperd_hosts())
    assert all(callable(resolve(dataset.loader)) for dataset in esperd_datasets())


def test_declarations_import_no_torch():
    modules = "esperd.builtins.hosts, esperd.builtins.datasets, esperd.builtins.schedules, esperd.builtins.strategies"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_without_scikit_learn_digits_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(MissingExtra, match=r"esperd\[digits\]"):
        resolve("esperd.builtins.data.digits:digits")()
