"""Several processes that grow one network: what they decide is decided once, and one that differs is an error on all of them.

Two real processes run the scenarios of ``rank_scenarios.py`` over gloo, once for this file; the tests read what they saw.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import rank_scenarios
import safetensors.torch
import torch
from small_growth import GATE, TRAIN, germinate, network

from esperd.errors import InvalidData
from esperd.growth.checksum import checksum, checksums
from esperd.growth.contribution import ablations, measure
from esperd.growth.ledger import Ledger
from esperd.growth.ranks import Alone
from esperd.growth.shards import gathered, shard

HERE = Path(__file__).parent
SIZE = 2
LONGEST_S = 30.0
"""Until an error must have reached every rank; meetings wait for 60 s, so none was noticed by waiting."""

WELL = (
    *("a_whole_life", "every_mode", "isolation", "statistics", "what_is_averaged", "shards", "first_rank_decides", "a_trial"),
    *("a_screening", "a_checkpoint", "all_fail_alike"),
)
DISAGREEMENTS = (
    *("a_gate_disagrees", "decisions_differ", "seeds_are_born_different", "a_rank_takes_another_turn"),
    "gradients_are_not_averaged",
)
WRONG = (
    *DISAGREEMENTS,
    *("a_source_fails", "the_loss_fails_at_the_gate", "a_rank_fails_when_the_other_is_done"),
    *("parted_ranks_go_on", "a_rank_is_silent", "a_rank_dies"),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(directory):
    """What each rank saw, by scenario."""
    command = [sys.executable, "-W", "error", str(HERE / "rank_scenarios.py"), ",".join(WELL + WRONG)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(SIZE), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        output = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [directory / f"results.{rank}.json" for rank in range(SIZE)]
    assert all(file.exists() for file in files), output
    told = [msgspec.json.decode(file.read_bytes()) for file in files]
    assert told[0].keys() == set(WELL + WRONG), output
    return lambda scenario: [rank.get(scenario, {}) for rank in told]


@pytest.fixture(scope="module")
def results(seen):
    """Results of a scenario that goes well, by rank."""

    def of(scenario):
        told = seen(scenario)
        assert all("result" in rank for rank in told), told
        return [rank["result"] for rank in told]

    return of


@pytest.fixture(scope="module")
def alone(directory):
    """What one process sees that does the same on the whole batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda scenario: msgspec.json.decode(msgspec.json.encode(getattr(rank_scenarios, scenario)(Alone(), directory)))
    torch.set_num_threads(threads)


def assert_close(directory, name):
    """Both ranks hold the same weights to the bit, and those of one process but for rounding."""
    one, *ranks = (safetensors.torch.load_file(directory / f"{name}.{which}.safetensors") for which in ("1.0", "2.0", "2.1"))
    for tensors in ranks:
        assert tensors.keys() == one.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, ranks[0][key])
            torch.testing.assert_close(tensor, one[key], rtol=1e-4, atol=1e-5)


# --- one network -----------------------------------------------------------------------------------------------------------


def test_a_seed_lives_from_germination_to_fossilized_on_all_ranks_as_in_one_process(results, alone, directory):
    first, second = results("a_whole_life")
    single = alone("a_whole_life")
    assert first == second
    assert first["stages"] == single["stages"]
    assert "fossilized" in first["stages"]
    assert_close(directory, "life")


@pytest.mark.parametrize("scenario", ["a_whole_life", "a_trial"])
def test_every_flop_of_every_rank_is_charged_and_no_other(results, alone, scenario):
    spent = alone(scenario)["state"]["spent"]
    assert all(rank["state"]["spent"] == pytest.approx(spent, rel=1e-12) for rank in results(scenario))
    assert spent["train"] > 0.0
    assert spent["incubation"] > 0.0
    assert spent["ablation"] > 0.0


def test_a_cull_leaves_the_same_structure_on_all_ranks(results):
    first, second = (rank["state"] for rank in results("a_whole_life"))
    assert [record["seed"] for record in first["records"]] == ["first#0"]
    assert [outcome["stage"] for outcome in first["outcomes"]] == ["culled", "fossilized"]
    assert first["groups"] == second["groups"] == [["host", 0.05], ["first#0", 0.05]]


@pytest.mark.parametrize("mode", ["lookahead", "straight_through", "frozen_input", "joint"])
def test_each_way_to_incubate_gives_what_one_process_gets(results, alone, directory, mode):
    first, second = (rank[mode] for rank in results("every_mode"))
    assert first == second
    assert first["refused"] is None
    if not (directory / f"{mode}.1.0.safetensors").exists():
        alone("every_mode")
    assert_close(directory, mode)


@pytest.mark.parametrize("mode", ["lookahead", "straight_through"])
def test_a_seed_behind_the_host_leaves_it_as_it_was_to_the_bit_on_every_rank(results, mode):
    for rank in results("isolation"):
        assert rank[mode]["learned"]
        assert rank[mode]["stage"] == "training"
        assert rank[mode]["same"]


def test_second_passes_share_what_the_host_computed_in_the_wrapper(results):
    assert [rank["lookahead"]["sharing"] for rank in results("isolation")] == [{"first": "shared"}] * SIZE


def test_a_seed_behind_the_host_does_not_travel_with_the_hosts_gradients(results):
    assert results("what_is_averaged") == [{"lookahead": 0, "straight_through": 0, "joint": 3}] * SIZE


def test_batch_norm_statistics_follow_rank_0_at_a_decision_point(results):
    first, second = results("statistics")
    assert first["after"] == second["after"]
    for whose in ("host", "first#0"):
        buffers = f"buffers of {whose}"
        assert second["before"][buffers] != first["before"][buffers] == second["after"][buffers]


def test_ranks_measure_a_part_of_the_gate_split_each_and_all_hold_the_whole_in_order(results):
    first, second = results("shards")
    assert first["equal"]
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 33
    assert first["charged"] == second["charged"] == 33 * first["cost"]


def test_what_rank_0_alone_decided_is_done_by_all(results):
    first, second = results("first_rank_decides")
    assert first == second
    assert [record["stage"] for record in first["state"]["records"]] == ["training"]


def test_a_controlled_trial_is_one_trial(results, alone):
    first, second = results("a_trial")
    assert first == second
    (trial,) = [record["trial"] for record in first["state"]["records"]]
    (single,) = [record["trial"] for record in alone("a_trial")["state"]["records"]]
    assert trial["steps_without"] == single["steps_without"] > trial["steps_with"]
    assert trial["flops"] == pytest.approx(single["flops"], rel=1e-12)
    assert trial["loss"] == pytest.approx(single["loss"], abs=1e-4)


def test_a_screening_has_one_winner(results, alone):
    first, second = results("a_screening")
    assert first == second
    single = alone("a_screening")
    assert first["candidates"] == 2
    (winner,) = first["state"]["records"]
    assert winner["seed"] == single["state"]["records"][0]["seed"]
    assert first["state"]["spent"] == pytest.approx(single["state"]["spent"], rel=1e-12)


def test_what_rank_0_wrote_every_rank_resumes_from(results):
    for rank in results("a_checkpoint"):
        assert rank["resumed"] == rank["undisturbed"]


def test_an_error_that_all_ranks_share_parts_nobody(results):
    first, second = results("all_fail_alike")
    assert first == second
    assert first["refused"] == "unknown_name"


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", DISAGREEMENTS)
def test_a_disagreement_is_an_error_on_every_rank_within_seconds(seen, scenario):
    for rank in seen(scenario):
        assert rank["error"] == "RanksDisagree"
        assert rank["fields"]["ranks"] == ["0", "1"]
        assert rank["seconds"] < LONGEST_S


def test_a_rank_whose_gate_disagrees_is_named_with_both_verdicts(seen):
    first, second = seen("a_gate_disagrees")
    assert first["message"] == second["message"]
    assert first["message"].startswith(
        "ranks disagree on gate G2 of first#0: passed: rank 0 says True, rank 1 says False; reason: rank 0 says 'gradient ratio"
    )
    assert "rank 1 says 'rank 1 is against it'" in first["message"]


def test_what_ranks_disagree_on_is_named_with_both_values(seen):
    def said(scenario):
        return seen(scenario)[0]["message"].partition("; ")[0]

    assert said("decisions_differ") == (
        "ranks disagree on the decision: arm.blueprint: rank 0 says 'norm', rank 1 says 'conv_light'"
    )
    assert re.fullmatch(
        r"ranks disagree on what the decision to germinate leaves: "
        r"tensors\.weights of first#0: rank 0 says '\w{16}', rank 1 says '\w{16}'",
        said("seeds_are_born_different"),
    )
    assert "tensors.weights of host" in said("gradients_are_not_averaged")
    assert said("a_rank_takes_another_turn") == (
        "ranks came to different points: rank 0 to where the gate pass begins, rank 1 to where the end of the epoch begins"
    )


@pytest.mark.parametrize(
    ("scenario", "error", "told"),
    [
        ("a_source_fails", "OSError", "in the decision to germinate: the kernel store of rank 1 is full"),
        ("the_loss_fails_at_the_gate", "ZeroDivisionError", "in the gate pass: no label is like this one"),
        ("a_rank_fails_when_the_other_is_done", "OSError", "in writing the report: the disk of rank 1 is full"),
    ],
)
def test_a_rank_that_raises_ends_the_others_with_its_name_and_its_error(seen, scenario, error, told):
    first, second = seen(scenario)
    assert second["error"] == error
    assert first["error"] == "RankFailed"
    assert first["message"].startswith(f"rank 1 raised {error} {told}; rank 0 had come to ")
    assert first["fields"]["rank"] == 1
    assert max(first["seconds"], second["seconds"]) < LONGEST_S


def test_ranks_that_have_parted_are_refused_at_once(seen):
    for rank in seen("parted_ranks_go_on"):
        assert rank["error"] == "RankFailed"
        assert rank["message"].startswith("these ranks have parted: ranks disagree on the weather: rank 0 says 'sunny'")


@pytest.mark.parametrize("scenario", ["a_rank_is_silent", "a_rank_dies"])
def test_a_rank_that_is_not_heard_of_is_an_error_and_no_deadlock(seen, scenario):
    first = seen(scenario)[0]
    assert first["error"] == "RankFailed"
    assert first["message"].startswith("a rank is not heard of at ")
    assert first["seconds"] < LONGEST_S


# --- the documents ---------------------------------------------------------------------------------------------------------


def test_the_documented_program_grows_a_network_under_torchrun(tmp_path):
    text = (HERE.parents[1] / "docs" / "growth.md").read_text(encoding="utf-8").partition("## Several processes")[2]
    program = tmp_path / "several.py"
    program.write_text(text.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE), str(program)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 0, run.stderr
    assert "grown by 2 processes: [('1#0', 'fossilized')]" in run.stdout


# --- the parts, in one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_shards_are_consecutive_and_as_large_as_each_other(size):
    numbers = torch.arange(23)
    split = [(part, part) for part in torch.split(numbers, [4, 1, 9, 9])]
    parts = [shard(split, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([inputs for part in parts for inputs, _ in part]), numbers)
    assert all(torch.equal(inputs, targets) for part in parts for inputs, targets in part)
    sizes = [sum(len(inputs) for inputs, _ in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_split_with_fewer_samples_than_ranks_is_refused():
    with pytest.raises(InvalidData, match="a split of 2 samples cannot be measured by 3 processes"):
        shard([(torch.zeros(2), torch.zeros(2))], 0, 3)


class Echo(Alone):
    """Two ranks that say the same."""

    size = 2

    def gather(self, what, value):
        return [value, value]


def test_what_ranks_measured_is_put_together_variant_by_variant():
    net = network(dropout=0.0)
    measured = measure(net, [GATE], rank_scenarios.smooth(Alone()).loss, variants=ablations([]) | {"as it is": {}})
    whole = gathered(Echo(), measured)
    assert torch.equal(whole.loss, measured.loss.repeat(2))
    assert whole.metric is None
    assert torch.equal(whole.variants["as it is"][0], measured.loss.repeat(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64])
def test_a_checksum_sees_every_number(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    sums = {checksum([("a", tensor)])}
    for place in range(15):
        changed = tensor.clone()
        changed.view(-1)[place] = 1
        sums.add(checksum([("a", changed)]))
    assert len(sums) == 16


def test_a_checksum_sees_names_shapes_order_and_signed_zeros():
    one, two = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    told = [
        [("a", one)],
        [("b", one)],
        [("a", two)],
        [("a", one.view(3, 1))],
        [("a", torch.tensor([1.0, 2.0, -0.0]))],
        [("a", one), ("b", two)],
        [("a", one.double())],
    ]
    assert len({checksum(tensors) for tensors in told}) == len(told)


def test_a_checksum_sees_beyond_its_first_chunk(monkeypatch):
    monkeypatch.setattr("esperd.growth.checksum.CHUNK", 4)
    tensor = torch.arange(11.0)
    swapped = tensor.clone()
    swapped[[1, 5]] = tensor[[5, 1]]
    assert checksum([("a", tensor)]) != checksum([("a", swapped)])


def test_equal_networks_have_equal_checksums_whatever_their_memory_looks_like():
    net = network()
    channels_last = network().to(memory_format=torch.channels_last)
    assert checksums(net) == checksums(channels_last)


def test_one_process_charges_for_all_of_them_until_they_settle():
    ledger = Ledger()
    ledger.processes = 2
    ledger.add("gate", 10.0)
    assert ledger.total == 20.0

    class Uneven(Alone):
        size = 2

        def gather(self, what, value):
            return [value, {**value, "gate": 24.0}]

    ledger.settle(Uneven())
    assert ledger.spent["gate"] == 22.0


class Careful(Alone):
    """Two ranks, of which the other one is more careful."""

    size = 2

    def gather(self, what, value):
        other = value
        if what.startswith("how second passes"):
            other = "whole"
        elif what == "whether passes may be stacked":
            other = False
        return [value, other]


def test_the_most_careful_rank_decides_how_passes_run():
    bold, careful = rank_scenarios.smooth(Alone()), rank_scenarios.smooth(Alone())
    careful = dataclasses.replace(careful, ranks=Careful())
    careful.sample = TRAIN
    for ranks, grown in ((Alone(), bold), (Alone(), careful)):
        rank_scenarios.epoch(ranks, grown)
        grown.apply(germinate("conv_light", "first"))
        for _ in range(4):
            rank_scenarios.epoch(ranks, grown)
    assert (bold.incubator.sharing, bold.gate_pass.fused) == ({"first": "shared"}, True)
    assert (careful.incubator.sharing, careful.gate_pass.fused) == ({"first": "whole"}, False)


def test_one_process_agrees_with_itself():
    ranks = Alone()
    with ranks.together("anything"):
        ranks.agree("anything", object())
        assert ranks.gather("a number", 1) == [1]
        assert ranks.first("a number", 2) == 2
    with pytest.raises(ValueError, match="this process is rank 0 and has to say its decisions"):
        ranks.first("its decisions", None, tuple)
