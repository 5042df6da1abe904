"""A checkpoint gives back what went in, and refuses what it cannot read."""

from __future__ import annotations

import base64
import contextlib
import json

import desks
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import CheckpointRejected
from esperd.store.blobs import Blobs
from esperd.trainer import checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a real checkpoint, from the middle of a job with living seeds."""
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    desk = desks.train_until(desks.growing_job(), blobs, desks.in_stage("blending"))
    return blobs.get(desk.checkpoints[-1][0])


def packed(data):
    """Header and MessagePack of a checkpoint."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, base64.b64decode(header["__metadata__"]["esperd"])


def repacked(data, change):
    """The checkpoint with another metadata text."""
    size = int.from_bytes(data[:8], "little")
    header, text = packed(data)
    header["__metadata__"]["esperd"] = base64.b64encode(change(text)).decode()
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


def test_state_and_tensors_come_back_as_they_were(written):
    state, tensors, streams = checkpoint.decode(written)
    torch.set_rng_state(streams["cpu"])
    again = checkpoint.encode(state, tensors)
    assert checkpoint.decode(again)[0] == state
    returned = checkpoint.decode(again)[1]
    assert set(returned) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(returned[name], tensor, rtol=0.0, atol=0.0, equal_nan=True)
    assert any(seed.stage == "blending" and 0.0 < seed.alpha < 1.0 for seed in state.run.grower.seeds)


def test_the_rng_stream_goes_on_where_it_was(written):
    state, tensors, _ = checkpoint.decode(written)
    torch.manual_seed(5)
    data = checkpoint.encode(state, tensors)
    expected = torch.randn(3)
    torch.manual_seed(77)
    checkpoint.restore_rng(checkpoint.decode(data)[2])
    assert torch.equal(torch.randn(3), expected)


def test_tensors_that_share_storage_are_each_kept(written):
    state, _, _ = checkpoint.decode(written)
    shared = torch.arange(6.0)
    data = checkpoint.encode(state, {"one": shared, "other": shared, "part": shared[2:4]})
    _, tensors, _ = checkpoint.decode(data)
    assert torch.equal(tensors["one"], shared)
    assert torch.equal(tensors["other"], shared)
    assert torch.equal(tensors["part"], shared[2:4])


def test_another_format_version_is_named(written):
    def newer(text):
        return msgspec.msgpack.encode({**msgspec.msgpack.decode(text), "format": 9})

    with pytest.raises(CheckpointRejected, match=r"format 9; this esperd reads 4"):
        checkpoint.decode(repacked(written, newer))


@pytest.mark.parametrize("value", [{}, [], None, {"format": 2}, "text"], ids=repr)
def test_a_state_of_another_shape_is_refused(written, value):
    with pytest.raises(CheckpointRejected):
        checkpoint.decode(repacked(written, lambda _text: msgspec.msgpack.encode(value)))


def test_a_checkpoint_without_its_rng_stream_is_refused(written):
    state, tensors, _ = checkpoint.decode(written)
    data = checkpoint.encode(state, tensors)
    with pytest.raises(CheckpointRejected, match="malformed"):
        checkpoint.decode(data.replace(b'"rng.cpu"', b'"rng.xyz"'))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_checkpoint_are_refused(data):
    with pytest.raises(CheckpointRejected):
        checkpoint.decode(data)


@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_a_damaged_checkpoint_is_refused_or_read_but_never_breaks_the_reader(written, draw):
    size = int.from_bytes(written[:8], "little")
    place = draw.draw(st.integers(0, size + 7))
    damaged = bytearray(written)
    damaged[place] ^= draw.draw(st.integers(1, 255))
    cut = draw.draw(st.sampled_from([len(written), size // 2, place]))
    with contextlib.suppress(CheckpointRejected):
        checkpoint.decode(bytes(damaged[:cut]))
