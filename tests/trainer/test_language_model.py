"""A language model from a text file to its report: the built-in transformer, and a model that calls its output logits."""

from __future__ import annotations

import math
from pathlib import Path

import desks
import numpy as np
import pytest
import torch
from torch import nn

from esperd.builtins.networks.transformer import transformer
from esperd.errors import InvalidData, InvalidModel
from esperd.growth.export import load
from esperd.messages.telemetry import EpochCompleted, TrainingStarted
from esperd.store.blobs import Blobs
from esperd.trainer.session import Session

WORDS = ("a seed grows", "the network learns", "some slots rest", "nothing is free", "the host trains")
SIZES = {"vocabulary": 27, "context": 12, "width": 16, "depth": 2, "heads": 2}


class Answering(nn.Module):
    """Returns more than its prediction, as models of Hugging Face do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.model(input_ids), "loss": None}


def answering(**options):
    return Answering(transformer(**options))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(". ".join(np.random.default_rng(3).choice(WORDS, 700)))
    return str(file)


def job(book, **changes):
    fields = {
        "host": "transformer",
        "host_options": {**SIZES, "vocabulary": len(set("".join(WORDS))) + 1},
        "data": "text",
        "data_options": {"path": book, "context": 12},
        "loss": "next_token",
        "budget": {"epochs": 3},
        "growth": {"blueprints": ["mlp_*"]},  # none of them fits tokens: the host trains alone
        "split": {"allow_duplicates": True},
        **changes,
    }
    return desks.growing_job(**fields)


@pytest.mark.parametrize("host", ["transformer", f"{__name__}:answering"])
def test_a_language_model_learns_a_text(book, host, tmp_path):
    ended = desks.train(job(book, host=host), Blobs(tmp_path / "blobs"))

    report, vocabulary = ended.report, job(book).host_options["vocabulary"]
    losses = [event.train_loss for event in ended.desk.of(EpochCompleted)]
    assert losses == sorted(losses, reverse=True)
    assert report.grown.loss < 0.7 * math.log(vocabulary)
    assert report.metric_name == "token_accuracy"
    assert report.grown.metric > 3 / vocabulary
    (started,) = ended.desk.of(TrainingStarted)
    assert [(slot.slot.removeprefix("model."), slot.topology, slot.shape) for slot in started.slots] == [
        ("blocks.1", "transformer", (12, 16)),
        ("blocks.2", "transformer", (12, 16)),
    ]
    assert started.exact_resume
    assert started.host_flops_per_sample > 0

    for name, data in ended.files.items():
        (tmp_path / name).write_bytes(data)
    rebuilt = load(tmp_path, host=answering if ":" in host else None)
    assert rebuilt(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 12, vocabulary)


def refused(tmp_path, error, job):
    with pytest.raises(error) as caught:
        Session(job, desks.PLUGINS, desks.InProcessDesk(), Blobs(tmp_path))
    return caught.value.message


def test_a_vocabulary_that_is_too_small_is_told_by_the_ids(book, tmp_path):
    told = refused(tmp_path, InvalidModel, job(book, host_options={**SIZES, "vocabulary": 5}))
    assert "its ids go up to" in told
    assert "is the model's vocabulary larger?" in told


def test_a_token_that_only_later_samples_hold_is_found_before_training(book, tmp_path):
    rare = tmp_path / "rare.txt"
    rare.write_text(Path(book).read_text() + "z" * 30)
    few = len(set("".join(WORDS))) + 1
    told = refused(tmp_path, InvalidData, job(str(rare), host_options={**SIZES, "vocabulary": few}))
    assert "audit split" in told
    assert f"the model has {few}" in told


def test_samples_longer_than_the_models_context_are_refused_with_both_numbers(book, tmp_path):
    told = refused(tmp_path, InvalidModel, job(book, data_options={"path": book, "context": 20}))
    assert "20 tokens are longer than the context 12" in told


def test_the_loss_of_labels_does_not_take_tokens(book, tmp_path):
    told = refused(tmp_path, InvalidModel, job(book, loss="cross_entropy"))
    assert 'set loss = "next_token"' in told
