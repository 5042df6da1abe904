"""The model card: every number in it is one of the job's, its code runs, and it is never written over a file of the user's."""

from __future__ import annotations

import re

import grown_networks
import msgspec
import pytest
import torch

from esperd.builtins.networks.cnn import cnn
from esperd.growth.card import REPORT, card, write_card
from esperd.growth.export import STRUCTURE, WEIGHTS, GrowthFile, HostReference, SampleSpec, encode
from esperd.growth.forms import write_forms
from esperd.growth.network import GrowingNetwork
from esperd.growth.parity import Parity
from esperd.growth.slots import find_slots
from esperd.messages.card import CARD, MARK
from esperd.messages.growth import Contribution, Stage
from esperd.messages.reports import Comparison, Metrics, Report, SeedOutcome

KEPT = SeedOutcome(
    seed="features.stage1#0",
    slot="features.stage1",
    blueprint="conv_light",
    stage=Stage.FOSSILIZED,
    reason="contribution is proven above rent",
    contribution=Contribution(loss=0.0412, lower=0.031, upper=0.0514, confidence=0.95, samples=359, epoch=14),
    parameters=123,
    flops_per_sample=45678.0,
    germinated_epoch=3,
    ended_epoch=14,
)
CULLED = SeedOutcome(
    seed="features.stage1#1",
    slot="features.stage1",
    blueprint="depth|wise",
    stage=Stage.CULLED,
    reason="the interval [-0.1, 0.2] holds 0 | <script>alert(1)</script>\nafter 3 measurements",
    contribution=None,
    parameters=99,
    flops_per_sample=11.0,
    germinated_epoch=4,
    ended_epoch=15,
)
GROWN = Metrics(
    loss=0.0831,
    metric=0.9777,
    parameters=12_234,
    flops_per_sample=907_912.0,
    training_flops=6.9e10,
    training_seconds=21.4,
    epochs=24.0,
)
COMPARISON = Comparison(
    metric=0.0111,
    metric_lower=0.0012,
    metric_upper=0.0223,
    loss=0.0271,
    loss_lower=0.0119,
    loss_upper=0.0423,
    confidence=0.95,
    samples=359,
)
MANIFEST = {
    "job": "job-7",
    "name": "digits",
    "rng_seed": 3,
    "job_sha256": "ab" * 32,
    "data": "digits",
    "data_sha256": "cd" * 32,
    "audit_loss": 0.0831,
    "audit_metric": 0.9777,
}


def report(**changes):
    told = Report(
        job="job-7",
        name="digits",
        rng_seed=3,
        metric_name="accuracy",
        grown=GROWN,
        control=msgspec.structs.replace(GROWN, loss=0.1102, metric=0.9666, parameters=9_866),
        comparison=COMPARISON,
        seeds=(KEPT, CULLED),
        refused=(),
        slots=(),
        flops={"train": 5.8e10, "incubation": 6.1e9},
        policy_unavailable=1,
        device="cpu",
        torch="2.13.0",
        esperd="0.1.0",
        resumed=2,
    )
    return msgspec.structs.replace(told, **changes)


@pytest.fixture(scope="module")
def files():
    """Weights and structure of a built-in host with one seed."""
    torch.manual_seed(0)
    model, x = cnn(channels=(3, 5)).eval(), torch.randn(2, 1, 8, 8)
    network = GrowingNetwork(model, find_slots(model, x, patterns=("features.stage1",)))
    grown_networks.add_seed(network, "conv_light", "features.stage1", alpha=0.7)
    reference = HostReference(factory="esperd.builtins.networks.cnn:cnn", options={"channels": [3, 5]})
    return encode(network, host=reference, sample=SampleSpec.of(x), history=(KEPT, CULLED), manifest=MANIFEST, version="0.1.0")


@pytest.fixture
def structure(files):
    return msgspec.json.decode(files[1], type=GrowthFile)


@pytest.fixture
def exported(tmp_path, files):
    (tmp_path / WEIGHTS).write_bytes(files[0])
    (tmp_path / STRUCTURE).write_bytes(files[1])
    (tmp_path / REPORT).write_bytes(msgspec.json.encode(report()))
    return tmp_path


def cells(text):
    """Rows of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def facts(text):
    return {row[0]: row[1:] for row in cells(text)}


# --- what it says


def test_the_head_is_what_hubs_read_and_holds_nothing_invented(structure):
    head, mark = card(structure, report()).split("\n---\n", 1)
    tags = ["- esperd", "- growing-network", "- pytorch"]
    assert head.splitlines() == ["---", "library_name: esperd", "tags:", *tags, "metrics:", "- accuracy"]
    assert mark.startswith(MARK)
    assert "license" not in head
    assert "metrics" not in card(structure, report(metric_name="shapes:hits")).split("\n---\n", 1)[0]


def test_it_says_what_the_network_is_and_where_it_comes_from(structure):
    told = facts(card(structure, report()))
    assert told["host"] == ['`esperd.builtins.networks.cnn:cnn` with `{"channels": [3, 5]}`']
    assert told["takes"] == ["`(B, 1, 8, 8) float32`"]
    assert told["fingerprint of the data"] == [f"`sha256:{'cd' * 32}`"]
    assert told["weights"] == [f"`sha256:{structure.weights_sha256}`"]
    assert told["written by"] == [f"esperd 0.1.0, torch {torch.__version__}"]
    assert "# digits\n" in card(structure)


def test_it_sets_the_grown_network_beside_the_control_with_the_interval(structure):
    text = card(structure, report())
    told = facts(text)
    assert told["loss"] == ["0.0831", "0.1102"]
    assert told["accuracy"] == ["0.9777", "0.9666"]
    assert "the control's loss minus the grown network's is +0.0271 [+0.0119, +0.0423]" in text
    assert "the grown network's accuracy minus the control's is +0.0111 [+0.0012, +0.0223]" in text
    assert "Paired over 359 samples (95% intervals)" in text
    assert "read once" in text


def test_without_a_control_it_says_that_nothing_is_known(structure):
    text = card(structure, report(control=None, comparison=None))
    assert facts(text)["loss"] == ["0.0831"]
    assert "whether growing paid is not known" in text


def test_every_seed_is_listed_the_culled_ones_too(structure):
    text = card(structure, report())
    (kept,) = [row for row in cells(text) if row[0] == "`features.stage1#0`"]
    (culled,) = [row for row in cells(text) if row[0] == "`features.stage1#1`"]
    contribution = "+0.0412 [+0.0310, +0.0514] at 95%, 359 samples"
    seed = structure.seeds[0]
    assert kept[1:6] == ["`conv_light`", "`features.stage1`", "add", "0.7", f"{seed.parameters:,}"]
    assert kept[8:] == [contribution, "not measured", "contribution is proven above rent"]
    assert culled[1:8] == [r"`depth\|wise`", "`features.stage1`", "culled", "4 to 15", "99", "11", "not measured"]
    assert "Seeds that germinated: 2; part of the network: 1." in text
    assert "known limit" in text


def test_words_of_a_job_are_no_markup_and_break_no_table(structure):
    text = card(structure, report())
    assert "<script>" not in text
    assert {len(row) for row in cells(text) if row[0].startswith("`features")} == {10, 11}, "one number of cells for each table"
    named = msgspec.structs.replace(structure, manifest={**MANIFEST, "name": "a\n# b [c](d) `e`"})
    (title,) = [line for line in card(named).splitlines() if line.startswith("# ")]
    assert title == r"# a # b \[c](d) \`e\`"


def test_costs_are_the_jobs(structure):
    text = card(structure, report())
    assert facts(text)["train"] == ["5.800e+10"]
    assert "went on from a checkpoint 2 times" in text
    assert "At 1 decision point the policy could not be reached" in text


def test_without_a_report_it_says_less_and_invents_nothing(structure):
    text = card(structure)
    assert facts(text)["loss"] == ["0.0831"]
    assert "What it cost" not in text
    assert "control" not in facts(text)
    bare = card(msgspec.structs.replace(structure, manifest={}, history=(), seeds=()))
    assert "The export holds no measurement." in bare
    assert "None germinated." in bare
    assert "Seeds that germinated: 0; part of the network: 0." in bare


def test_a_report_of_another_job_is_not_believed(structure):
    assert card(structure, report(job="job-8")) == card(structure)


def test_a_seed_that_was_folded_is_said_to_be(structure):
    merged = msgspec.structs.replace(structure, seeds=(), manifest={**MANIFEST, "merged": ["features.stage1#0"]})
    text = card(merged, report())
    assert "parameters" not in [row[0] for row in cells(text.partition("## How good")[0])]
    assert "no fold changed an output by more than 1e-05" in text
    (row,) = [row for row in cells(text) if row[0] == "`features.stage1#0`"]
    assert row[3] == "folded into a layer beside it"
    assert "part of the network: 0; folded into layers of the host: 1." in text


def test_parity_is_told_with_its_tolerance(structure):
    parity = Parity(
        form="onnx",
        file="model.onnx",
        batch_sizes=(1, 2, 3, 4),
        largest_difference=2.4e-7,
        tolerance=1e-4,
        runtime="onnxruntime 1.32.0",
    )
    (row,) = [row for row in cells(card(structure, None, [parity])) if row[0] == "`model.onnx`"]
    assert row[1:] == ["onnxruntime 1.32.0", "1, 2, 3, 4", "2.4e-07", "1e-04"]
    assert "Parity" not in card(structure)


# --- its code


def run_the_code_of(text):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_code_in_it_runs_for_every_form_and_every_form_answers_alike(exported, monkeypatch):
    write_forms(exported, ("pt2", "onnx"))
    monkeypatch.chdir(exported)
    names = {}
    answers = []
    for code in re.findall(r"```python\n(.*?)```", (exported / CARD).read_text(), flags=re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
        answers.append(names["outputs"])
    x = names["x"]
    assert torch.equal(names["model"].eval()(x), names["network"](x))
    for output in (answers[0], answers[2], torch.from_numpy(answers[3][0])):
        torch.testing.assert_close(output, names["network"](x), rtol=1e-4, atol=1e-4)


def test_the_code_for_a_host_of_the_users_own_runs_where_the_host_is_found(tmp_path, monkeypatch):
    network, x = grown_networks.build("cnn")
    reference = HostReference(factory="small_growth:Host", options={"dropout": 0.2})
    weights, structure = encode(network, host=reference, sample=SampleSpec.of(x), version="0.1.0")
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / STRUCTURE).write_bytes(structure)
    text = write_card(tmp_path).read_text()
    assert "import_host=True imports small_growth:Host. Only if you trust it!" in text
    monkeypatch.chdir(tmp_path)
    assert torch.equal(run_the_code_of(text)["network"](x), network(x))


def test_a_network_that_takes_integers_is_shown_integers(structure):
    tokens = msgspec.structs.replace(structure, input=SampleSpec(shape=(5,), dtype="int64"))
    assert "x = torch.ones(2, 5, dtype=torch.int64)" in card(tokens)


# --- its file


def test_a_card_is_written_beside_its_files_and_replaced(exported):
    path = exported / CARD
    assert write_card(exported) == path
    first = path.read_text()
    assert facts(first)["accuracy"] == ["0.9777", "0.9666"]
    (exported / REPORT).unlink()
    assert write_card(exported) == path
    assert path.read_text() != first
    assert {file.name for file in exported.iterdir()} == {CARD, WEIGHTS, STRUCTURE}


@pytest.mark.parametrize("edited", [True, False], ids=["made their own", "never esperd's"])
def test_a_readme_of_the_users_is_left_alone(exported, edited):
    path = exported / CARD
    path.write_text("# My project")
    if edited:
        path.unlink()
        write_card(exported)
        path.write_text(path.read_text().replace(MARK + "\n", "").replace("library_name", "license: mit\nlibrary_name"))
    before = path.read_bytes()
    assert write_card(exported) is None
    assert path.read_bytes() == before
