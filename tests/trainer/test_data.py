"""What data a job accepts, and what it refuses before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esperd.builtins.datasets import esperd_datasets
from esperd.errors import ImportFailed, InvalidData, InvalidJob, UnknownName
from esperd.messages.jobs import Budget, Job, Split
from esperd.plugins import Registry
from esperd.trainer.data import ArraySplit, check_labels, epoch_order, load_splits

DATASETS = Registry("datasets", {dataset.name: dataset for dataset in esperd_datasets()})


def job(**fields):
    return Job(**{"host": "cnn", "data": "digits", "budget": Budget(epochs=1), **fields})


def pair(rows, *, start=0, classes=3):
    """``rows`` different samples of two features."""
    x = np.arange(start, start + rows, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    return x, np.arange(rows) % classes


def three(train=6, gate=3, audit=3):
    return {"train": pair(train), "gate": pair(gate, start=100), "audit": pair(audit, start=200)}


class Source:
    """Gives ``load_splits`` a user's function that returns whatever the test wants."""

    returned = None

    @staticmethod
    def load(**options):
        found = Source.returned
        return found(**options) if callable(found) else found


def load(returned, **fields):
    Source.returned = returned
    return load_splits(job(data=f"{__name__}:Source.load", **fields), DATASETS)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


class Lazy(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def test_digits_are_divided_by_the_splits_fractions():
    splits = load_splits(job(split=Split(gate=0.25, audit=0.2)), DATASETS)

    assert (splits.train.samples, splits.gate.samples, splits.audit.samples) == (1797 - 449 - 359, 449, 359)
    x, y = splits.train.batch(torch.tensor([3, 0]))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((2, 1, 8, 8), torch.float32, (2,), torch.int64)
    assert float(x.max()) <= 1.0
    assert not splits.inexact_because


def test_the_same_split_seed_gives_the_same_splits_and_another_gives_others():
    first, again, other = (load_splits(job(split=Split(seed=seed)), DATASETS).fingerprint for seed in (0, 0, 1))

    assert first == again
    assert first != other


def test_a_divided_set_keeps_every_sample_once():
    splits = load(pair(50))

    seen = torch.cat([part.batch(torch.arange(len(part)))[0][:, 0] for part in (splits.train, splits.gate, splits.audit)])
    assert sorted(seen.tolist()) == list(range(50))


def test_a_mapping_of_splits_is_taken_as_it_is():
    splits = load(three())

    assert torch.equal(splits.gate.batch(torch.tensor([0]))[0], torch.full((1, 2), 100.0))


def test_tensors_lists_and_tensor_datasets_are_accepted():
    x, y = torch.arange(20.0)[:, None], torch.arange(20) % 2

    assert load((x, y)).train.samples == load(torch.utils.data.TensorDataset(x, y)).train.samples == 12
    assert load(([[float(i)] for i in range(20)], [0, 1] * 10)).train.samples == 12


def test_options_reach_the_users_function():
    assert load(lambda rows: pair(rows), data_options={"rows": 10}).train.samples == 6


def test_a_missing_or_unknown_split_is_named():
    with pytest.raises(InvalidData, match=r"missing: \['audit'\], unknown: \['test'\]"):
        load({"train": pair(5), "gate": pair(5, start=50), "test": pair(5, start=90)})


def test_a_missing_gate_is_taken_from_train_and_audit_stays_as_it_came():
    parts = {"train": pair(20), "audit": pair(5, start=100)}
    splits, again, other = (load(parts, split=Split(gate=0.25, seed=seed)) for seed in (0, 0, 1))

    assert [part.samples for part in (splits.train, splits.gate, splits.audit)] == [15, 5, 5]
    seen = torch.cat([part.batch(torch.arange(len(part)))[0][:, 0] for part in (splits.train, splits.gate)])
    assert sorted(seen.tolist()) == list(range(20))
    assert splits.audit.batch(torch.arange(5))[0][:, 0].tolist() == [100.0, 101.0, 102.0, 103.0, 104.0]
    assert splits.fingerprint == again.fingerprint != other.fingerprint


class Series:
    """Divides itself, as what has an order of its own must."""

    def divided(self, *, gate, audit):
        return {"train": pair(10), "gate": pair(round(10 * gate), start=50), "audit": pair(round(10 * audit), start=90)}


def test_data_that_divides_itself_is_told_the_shares():
    splits = load(Series(), split=Split(gate=0.3, audit=0.4))

    assert [part.samples for part in (splits.train, splits.gate, splits.audit)] == [10, 3, 4]
    with pytest.raises(InvalidJob, match="leave nothing to train on"):
        load(Series(), split=Split(gate=0.6, audit=0.4))


def test_data_that_fails_to_divide_itself_is_shown_with_its_traceback():
    class Torn(Series):
        def divided(self, *, gate, audit):
            raise RuntimeError("torn")

    with pytest.raises(ImportFailed, match="RuntimeError: torn"):
        load(Torn())


def text_job(path, **fields):
    options = {"path": str(path), **fields.pop("data_options", {})}
    return job(data="text", loss="next_token", data_options=options, **fields)


def test_a_text_becomes_samples_of_tokens_and_the_tokens_that_follow(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvw"), 4_000)))
    splits = load_splits(text_job(file, data_options={"context": 16}), DATASETS)

    x, y = splits.gate.batch(torch.arange(3))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, 16), torch.int64, (3, 16), torch.int64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    check_labels(splits, 23)


def test_windows_that_repeat_by_chance_are_duplicates_too(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("tick tock " * 100)

    with pytest.raises(InvalidData, match=r"gate split .* also in train.* allow_duplicates"):
        load_splits(text_job(file, data_options={"context": 4}), DATASETS)
    allowed = text_job(file, data_options={"context": 4}, split=Split(allow_duplicates=True))
    assert load_splits(allowed, DATASETS).gate.samples == 49


def test_next_token_refuses_targets_that_are_no_tokens():
    x = np.arange(40).reshape(10, 4)

    with pytest.raises(InvalidData, match="next_token needs labels"):
        load((x, x + 0.5), loss="next_token")
    with pytest.raises(InvalidData, match=r"label -1 .* negative"):
        load((x, x - 1), loss="next_token")


def test_an_empty_split_is_refused():
    with pytest.raises(InvalidData, match="gate split is empty"):
        load(three(gate=0))


def test_fractions_that_leave_no_training_data_are_refused():
    with pytest.raises(InvalidJob, match="leave nothing to train on"):
        load(pair(10), split=Split(gate=0.5, audit=0.5))


@pytest.mark.parametrize(("name", "other"), [("gate", "train"), ("audit", "train"), ("audit", "gate")])
def test_overlapping_splits_are_refused_with_the_number_of_shared_samples(name, other):
    parts = three()
    parts[name] = tuple(np.concatenate([ours, theirs[:2]]) for ours, theirs in zip(parts[name], parts[other], strict=True))

    with pytest.raises(InvalidData, match=f"2 of 5 samples of the {name} split .* are also in {other}"):
        load(parts)


def test_repeated_samples_are_allowed_when_the_job_says_so():
    x, y = np.zeros((20, 2), np.float32), np.zeros(20)

    with pytest.raises(InvalidData, match="allow_duplicates"):
        load((x, y))
    assert load((x, y), split=Split(allow_duplicates=True)).train.samples == 12


def test_the_same_input_with_another_target_is_no_overlap():
    parts = three()
    parts["gate"] = (parts["train"][0][:3], parts["train"][1][:3] + 1)

    assert load(parts).gate.samples == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused_with_their_row(bad):
    parts = three()
    parts["audit"][0][1, 0] = bad

    with pytest.raises(InvalidData, match=r"inputs of the audit split .* NaN or infinite \(first in row 1\)"):
        load(parts)


def test_targets_that_are_not_finite_are_refused():
    x, _ = pair(10)
    with pytest.raises(InvalidData, match="targets of the data set"):
        load((x, np.full(10, np.nan)), loss="mse")


def test_lengths_of_inputs_and_targets_must_agree():
    with pytest.raises(InvalidData, match="10 inputs and 9 targets"):
        load((pair(10)[0], pair(9)[1]))
    parts = three()
    parts["gate"] = (parts["gate"][0], parts["gate"][1][:2])
    with pytest.raises(InvalidData, match="3 inputs and 2 targets"):
        load(parts)


@pytest.mark.parametrize(("labels", "message"), [([0, -2, 1], "label -2 .* row 1"), ([0.5, 1, 2], "fractions")])
def test_cross_entropy_refuses_labels_that_are_none(labels, message):
    parts = three()
    parts["gate"] = (parts["gate"][0], np.array(labels))

    with pytest.raises(InvalidData, match=message):
        load(parts)


def test_labels_beyond_the_models_outputs_are_refused_by_split_row_and_label():
    splits = load(three())

    check_labels(splits, 3)
    with pytest.raises(InvalidData, match="label 2 in row 2 of the train split"):
        check_labels(splits, 2)


def test_mse_targets_become_float():
    assert load(three(), loss="mse").train.batch(torch.tensor([0]))[1].dtype == torch.float32


@pytest.mark.parametrize("values", [np.array([None] * 10, dtype=object), np.array(["a"] * 10), np.zeros(10, complex)])
def test_arrays_of_anything_but_numbers_are_refused(values):
    with pytest.raises(InvalidData, match="not of numbers"):
        load((values, np.zeros(10, int)))


def test_splits_of_different_shapes_are_refused():
    parts = three()
    parts["gate"] = (np.zeros((3, 5), np.float32), parts["gate"][1])

    with pytest.raises(InvalidData, match="gate split differ"):
        load(parts)


@pytest.mark.parametrize(
    ("shape", "expected"), [((9, 6, 8, 3), (3, 6, 8)), ((9, 3, 6, 8), (3, 6, 8)), ((9, 6, 8), (1, 6, 8)), ((9, 4), (4,))]
)
def test_bytes_are_pixels(shape, expected):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    splits = load({"train": (images[:5], range(5)), "gate": (images[5:7], range(2)), "audit": (images[7:], range(2))})

    x, _ = splits.train.batch(torch.arange(5))
    assert x.shape[1:] == expected
    assert x.dtype == torch.float32
    assert sorted(x.flatten().tolist()) == sorted((torch.from_numpy(images[:5]).flatten() / 255.0).tolist())


def test_pixels_with_an_unclear_channel_axis_are_refused():
    with pytest.raises(InvalidData, match="channel axis is not clear"):
        load((np.zeros((9, 3, 8, 3), np.uint8), np.zeros(9)))


def test_read_only_big_endian_and_double_arrays_are_taken():
    x, y = pair(10)
    x = x.astype(">f8")
    x.setflags(write=False)

    assert load((x, y)).train.batch(torch.tensor([0]))[0].dtype == torch.float32


def test_a_raising_function_is_shown_with_its_traceback():
    def broken():
        raise RuntimeError("the disk is elsewhere")

    with pytest.raises(ImportFailed, match="RuntimeError: the disk is elsewhere") as caught:
        load(broken)
    assert "broken" in str(caught.value.fields["traceback"])


def test_an_unknown_data_set_lists_what_exists():
    with pytest.raises(UnknownName, match="digits"):
        load_splits(job(data="digitz"), DATASETS)


def test_an_option_the_function_does_not_take_is_named():
    with pytest.raises(InvalidData, match="size"):
        load_splits(job(data_options={"size": 3}), DATASETS)


@pytest.mark.parametrize("returned", [None, 3, np.zeros(4), (1, 2, 3), (1, 2)])
def test_anything_else_a_function_returns_is_refused(returned):
    with pytest.raises(InvalidData, match="must give"):
        load(returned)


def test_datasets_are_fetched_on_demand_and_make_resume_inexact():
    splits = load({name: Lazy(*(torch.as_tensor(part) for part in parts)) for name, parts in three().items()})

    x, y = splits.train.batch(torch.tensor([4, 1]))
    assert x.tolist() == [[4.0, 4.0], [1.0, 1.0]]
    assert y.tolist() == [1, 1]
    assert splits.fingerprint is None
    assert splits.inexact_because


def test_one_dataset_is_divided():
    splits = load(Lazy(*(torch.as_tensor(values) for values in pair(20))))

    assert (len(splits.train), len(splits.gate), len(splits.audit)) == (12, 4, 4)


def test_subsets_of_one_dataset_may_not_share_rows():
    whole = Lazy(*(torch.as_tensor(values) for values in pair(20)))
    subset = torch.utils.data.Subset

    with pytest.raises(InvalidData, match="1 rows of the gate split are also in train"):
        load({"train": subset(whole, range(10)), "gate": subset(whole, range(9, 15)), "audit": subset(whole, range(15, 20))})


def test_a_dataset_is_checked_batch_by_batch():
    x, y = (torch.as_tensor(values) for values in pair(20))
    x[7] = torch.nan
    splits = load({"train": Lazy(x, y), **{name: part for name, part in three().items() if name != "train"}})

    with pytest.raises(InvalidData, match="NaN"):
        splits.train.batch(torch.tensor([7]))
    check_labels(splits, 3)
    splits.train.check_labels(2)
    with pytest.raises(InvalidData, match="label 2"):
        splits.train.batch(torch.tensor([1, 2]))


def test_a_dataset_that_raises_is_shown_with_its_rows():
    class Broken(Lazy):
        def __getitem__(self, index):
            if index == 3:
                raise KeyError("gone")
            return super().__getitem__(index)

    splits = load(three() | {"train": Broken(*(torch.as_tensor(values) for values in pair(6)))})

    with pytest.raises(InvalidData, match=r"rows \[3\].*KeyError"):
        splits.train.batch(torch.tensor([3]))


def test_npz_with_splits_and_with_one_set(tmp_path):
    np.savez(
        tmp_path / "parts.npz",
        **{f"{axis}_{name}": part[i] for name, part in three().items() for i, axis in enumerate("xy")},
    )
    np.savez(tmp_path / "whole.npz", x=pair(10)[0], y=pair(10)[1])

    assert load_splits(job(data="parts.npz", workdir=str(tmp_path)), DATASETS).gate.samples == 3
    assert load_splits(job(data=str(tmp_path / "whole.npz")), DATASETS).train.samples == 6


def test_npz_inputs_can_be_normalised_by_channel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(10))
    plain = load_splits(job(data=str(tmp_path / "a.npz")), DATASETS)
    options = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    normal = load_splits(job(data=str(tmp_path / "a.npz"), data_options=options), DATASETS)

    rows = torch.arange(6)
    mean, std = (torch.tensor(options[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(normal.train.batch(rows)[0], (plain.train.batch(rows)[0] - mean) / std)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mean": [1, 2]}, "2 values for 3"), ({"std": 0}, "above 0"), ({"mean": "x"}, "must be"), ({"crop": 1}, "not crop")],
)
def test_wrong_npz_options_are_named(tmp_path, options, message):
    np.savez(tmp_path / "a.npz", x=np.zeros((10, 8, 8, 3), np.uint8), y=np.arange(10))

    with pytest.raises(InvalidData, match=message):
        load_splits(job(data=str(tmp_path / "a.npz"), data_options=options), DATASETS)


def test_an_unreadable_npz_says_why(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}] * 3, dtype=object), y=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")

    for name, message in (
        ("absent.npz", "No such file"),
        ("text.npz", "not an .npz"),
        ("other.npz", "must hold x and y"),
        ("pickled.npz", "plain arrays"),
        ("array.npz", r"array\.npz is a single array .* np\.savez"),
        ("nul\0.npz", "null byte"),
    ):
        with pytest.raises(InvalidData, match=message):
            load_splits(job(data=name, workdir=str(tmp_path)), DATASETS)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10_000), samples=st.integers(1, 200))
def test_an_epochs_order_is_a_permutation_that_only_its_arguments_decide(seed, epoch, samples):
    torch.rand(3)
    order = epoch_order(seed, epoch, samples)

    assert torch.equal(order, epoch_order(seed, epoch, samples))
    assert sorted(order.tolist()) == list(range(samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(10) for epoch in range(10)}

    assert len(orders) == 100


def test_a_split_holds_what_it_was_given():
    split = ArraySplit("train", torch.arange(4.0), torch.arange(4))

    assert len(split) == split.samples == 4
