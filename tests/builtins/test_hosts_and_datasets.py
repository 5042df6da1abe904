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
from esperd.declarations import resolve
from esperd.errors import InvalidModel, MissingExtra


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
    ],
)
def test_a_wrong_host_option_is_named(build, options):
    with pytest.raises(InvalidModel, match=next(iter(options))):
        build(**options)


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
