"""Data by path: text, idx and CIFAR files as they are published, and what is said of those that are not as they should be."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from esperd.builtins.data.cifar import cifar
from esperd.builtins.data.idx import idx
from esperd.builtins.data.text import text
from esperd.errors import InvalidData

# --- text ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(chr(ord("a") + (7 * place) % 26) for place in range(200)), encoding="utf-8")
    return str(file)


def spelled(ids, alphabet):
    return "".join(alphabet[index] for index in ids)


def test_a_text_is_cut_by_place_and_no_window_reaches_over_a_border(book):
    whole = Path(book).read_text(encoding="utf-8")
    alphabet = sorted(set(whole))
    parts = text(book, context=10).divided(gate=0.2, audit=0.1)

    starts = {"train": 0, "gate": 140, "audit": 180}
    ends = {"train": 140, "gate": 180, "audit": 200}
    for name, (x, y) in parts.items():
        assert x.dtype == y.dtype == np.int64
        for row, (ids, following) in enumerate(zip(x, y, strict=True)):
            place = starts[name] + 10 * row
            assert spelled(ids, alphabet) == whole[place : place + 10]
            assert spelled(following, alphabet) == whole[place + 1 : place + 11]
            assert place + 11 <= ends[name]
    assert [len(x) for x, _ in parts.values()] == [13, 3, 1]


def test_a_stride_makes_the_train_part_overlap_and_no_other(book):
    parts = text(book, context=9, stride=3).divided(gate=0.2, audit=0.1)

    assert [len(x) for x, _ in parts.values()] == [44, 4, 2]
    assert np.array_equal(parts["train"][0][0][3:], parts["train"][0][1][:6])


def test_the_vocabulary_is_that_of_the_whole_file_or_the_one_given(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("baé\nab€\n" * 5, encoding="utf-8")

    assert text(str(file), context=2).tokens[:8].tolist() == [2, 1, 3, 0, 1, 2, 4, 0]
    assert text(str(file), context=2, vocabulary="€é\nba").tokens[:8].tolist() == [3, 4, 1, 2, 4, 3, 0, 2]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"abc\xffdef", {}, "not UTF-8 text: byte 3 is 0xff"),
        (b"\xef\xbb\xbfabc\xffdef", {}, "not UTF-8 text: byte 6 is 0xff"),
        (b"", {}, "is empty"),
        (b"abcabz", {"vocabulary": "abc"}, "character 'z' at place 5 .* not in the vocabulary of 3"),
        (b"abc", {"vocabulary": "aba"}, "different characters"),
        (b"abc", {"vocabulary": ["a"]}, "different characters"),
        (b"abc", {"vocabulary": "ab\ud800"}, r"half a character, '.ud800' at place 2: .*a\.txt"),
        (b"abc", {"context": 0}, "'context' of data 'text' must be a whole number"),
        (b"abc", {"stride": 1.5}, "'stride'"),
    ],
)
def test_a_text_that_cannot_be_read_says_why(tmp_path, content, options, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)

    with pytest.raises(InvalidData, match=message):
        text(str(file), **options)


def test_a_byte_order_mark_is_no_character(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfabba")

    assert text(str(file), context=1).tokens.tolist() == [0, 1, 1, 0]
    assert text(str(file), context=1, vocabulary="ba").tokens.tolist() == [1, 0, 0, 1]


def test_a_part_too_short_for_a_window_is_named(book):
    with pytest.raises(InvalidData, match=r"audit part .* has 20 characters; one sample needs 21"):
        text(book, context=20).divided(gate=0.2, audit=0.1)


@pytest.mark.parametrize("load", [lambda path: text(path), lambda path: idx(path, path), lambda path: cifar(path)])
def test_a_path_that_leads_nowhere_is_named(load, tmp_path):
    with pytest.raises(InvalidData, match=r"absent"):
        load(str(tmp_path / "absent"))
    with pytest.raises(InvalidData, match="must be a path, not 3"):
        load(3)
    for name in ("nul\0", "half\ud800"):
        with pytest.raises(InvalidData, match=rf"cannot be a path: .*{name[:3]}"):
            load(name)


# --- idx -------------------------------------------------------------------------------------------------------------------

PIXELS = np.arange(5 * 3 * 2, dtype=np.uint8).reshape(5, 3, 2)
LABELS = np.array([0, 1, 2, 1, 0], dtype=np.uint8)


def idx_bytes(array, kind=0x08, shape=None):
    shape = array.shape if shape is None else shape
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Paths of an image and a label file, as they are published."""
    images, labels = tmp_path / "images-idx3-ubyte.gz", tmp_path / "labels-idx1-ubyte"
    images.write_bytes(gzip.compress(idx_bytes(PIXELS)))
    labels.write_bytes(idx_bytes(LABELS))
    return images, labels


def test_idx_files_are_read_packed_or_not(mnist):
    x, y = idx(*map(str, mnist))

    assert np.array_equal(x, PIXELS)
    assert x.dtype == np.uint8
    assert np.array_equal(y, LABELS)


@pytest.mark.parametrize(("kind", "dtype"), [(0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")])
def test_idx_files_hold_every_kind_of_number(mnist, kind, dtype):
    values = np.array([[1, -2], [3, -4], [5, 6], [7, 8], [9, 10]], dtype=dtype)
    mnist[0].write_bytes(idx_bytes(values, kind))

    assert np.array_equal(idx(*map(str, mnist))[0], values)


def test_idx_test_files_become_the_audit_split(mnist):
    images, labels = map(str, mnist)

    assert {name: len(x) for name, (x, _) in idx(images, labels, images, labels).items()} == {"train": 5, "audit": 5}
    with pytest.raises(InvalidData, match="'test_labels' of data 'idx' must be a path"):
        idx(images, labels, test_images=images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file: it begins with nothing"),
        (b"\x89PNG....", "no idx file: it begins with 89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\0", "no idx file"),
        (b"\0\0\x08\x03\0\0\0\x05", "ends within its header"),
        (idx_bytes(PIXELS)[:-1], "30 bytes, but 29 follow its header; it is truncated"),
        (idx_bytes(PIXELS) + b"\0", "longer than it should be"),
        (idx_bytes(PIXELS, shape=(2**32 - 1, 2**32 - 1)), "truncated"),
        (gzip.compress(idx_bytes(PIXELS), mtime=0)[:-4], "cannot be unpacked: .*ended"),
        (gzip.compress(idx_bytes(PIXELS), mtime=0)[:20] + b"x" * 30, "cannot be unpacked"),
        (idx_bytes(PIXELS, shape=(5, 3, 2, *[1] * 62)), "has 65 dimensions; at most 32"),
        (idx_bytes(PIXELS[:4]), "holds 4 samples and .* 5 labels"),
    ],
)
def test_a_malformed_idx_file_is_named_with_what_is_wrong(mnist, content, message):
    mnist[0].write_bytes(content)

    with pytest.raises(InvalidData, match=message) as caught:
        idx(*map(str, mnist))
    assert "idx" in caught.value.message


def test_a_file_of_images_is_no_file_of_labels(mnist):
    with pytest.raises(InvalidData, match=r"holds uint8 numbers of shape \(5, 3, 2\), not one label a sample"):
        idx(str(mnist[0]), str(mnist[0]))


# --- CIFAR -----------------------------------------------------------------------------------------------------------------


def records(count, seed, *label_classes):
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, classes, (count, 1), dtype=np.uint8) for classes in label_classes]
    return np.concatenate([*labels, rng.integers(0, 256, (count, 3072), dtype=np.uint8)], axis=1)


@pytest.fixture
def cifar10(tmp_path):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records(4, number, 10).tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records(3, 6, 10).tobytes())
    return tmp_path


@pytest.fixture
def cifar100(tmp_path):
    (tmp_path / "train.bin").write_bytes(records(6, 1, 20, 100).tobytes())
    (tmp_path / "test.bin").write_bytes(records(3, 2, 20, 100).tobytes())
    return tmp_path


def test_cifar_10_is_read_batch_after_batch(cifar10):
    parts = cifar(str(cifar10))

    x, y = parts["train"]
    assert (x.shape, x.dtype, y.shape) == ((20, 3, 32, 32), np.uint8, (20,))
    second = records(4, 2, 10)
    assert np.array_equal(x[4:8].reshape(4, -1), second[:, 1:])
    assert np.array_equal(y[4:8], second[:, 0])
    assert len(parts["audit"][0]) == 3


def test_cifar_100_has_fine_and_coarse_labels(cifar100):
    expected = records(6, 1, 20, 100)

    assert np.array_equal(cifar(str(cifar100))["train"][1], expected[:, 1])
    assert np.array_equal(cifar(str(cifar100), labels="coarse")["train"][1], expected[:, 0])
    assert np.array_equal(cifar(str(cifar100))["audit"][0][0].ravel(), records(3, 2, 20, 100)[0, 2:])


def test_labels_that_cifar_10_does_not_have_are_refused(cifar10):
    with pytest.raises(InvalidData, match=r"must be fine for CIFAR-10 in .*, not 'coarse'"):
        cifar(str(cifar10), labels="coarse")
    with pytest.raises(InvalidData, match=rf"must be fine for CIFAR-10 in {cifar10}, not \['fine'\]"):
        cifar(str(cifar10), labels=["fine"])


@pytest.mark.parametrize("names", [("data_batch_1", "batches.meta"), ("train", "meta")])
def test_the_pickled_version_of_cifar_is_refused_unread(tmp_path, names):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))

    with pytest.raises(InvalidData, match=r"python version of CIFAR-10+, which is pickled: reading it can run code"):
        cifar(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_lacks_a_batch_or_is_none_of_cifar_says_so(cifar10, tmp_path_factory):
    (cifar10 / "data_batch_3.bin").unlink()
    with pytest.raises(InvalidData, match=r"lacks data_batch_3.bin of the binary version of CIFAR-10"):
        cifar(str(cifar10))
    with pytest.raises(InvalidData, match="is a file, not a folder; unpack it"):
        cifar(str(cifar10 / "test_batch.bin"))
    with pytest.raises(InvalidData, match="is no folder of"):
        cifar(str(tmp_path_factory.mktemp("empty")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"test_batch.bin has 0 bytes"),
        (records(3, 6, 10).tobytes()[:-1], "9,218 bytes, not a multiple of 3,073"),
        (records(1, 6, 10).tobytes() + b"\x0a" + bytes(3072), "fine label 10 in record 1"),
    ],
)
def test_a_malformed_batch_of_cifar_is_named_with_what_is_wrong(cifar10, content, message):
    (cifar10 / "test_batch.bin").write_bytes(content)

    with pytest.raises(InvalidData, match=message):
        cifar(str(cifar10))
