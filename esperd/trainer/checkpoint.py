"""A checkpoint as one file: safetensors, with everything that is not a tensor as MessagePack in its metadata.

Reading it runs no code. What it holds is enough to go on to the bit: weights, seeds, optimiser, RNG streams, the place in the
data, the policy's state and the ledger.
"""

from __future__ import annotations

import base64
import math
import random
from typing import Any, Literal

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch

from esperd.errors import CheckpointRejected
from esperd.growth.governor import Watch
from esperd.growth.snapshot import GrowerState
from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.growth import Attribution
from esperd.messages.jobs import Artifact
from esperd.messages.reports import Metrics, RefusedArm
from esperd.trainer.stopwatch import ArmSeconds
from esperd.trainer.unavailable import UnavailableArm

FORMAT = 4
METADATA_KEY = "esperd"

PYTHON_RNG_VERSION = 3
"""Version of ``random.getstate()`` since Python 3.2."""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """A training run in the middle of its budget, without its tensors."""

    phase: Literal["growth", "control"]
    grower: GrowerState
    batch: int
    """Batches of the current epoch that are done."""
    loss_samples: int
    """Samples in the current epoch's loss so far."""
    seconds: float
    gate_losses: tuple[float, ...]
    train_losses: tuple[float, ...] = ()
    gate_flops: tuple[float, ...] = ()
    """FLOPs spent when each gate loss was measured."""
    trial_flops: tuple[float, ...] = ()
    """Those of them that went into networks nobody trains on; fewer entries where an older esperd began, which did not count
    them: of the latest losses."""
    seconds_shares: tuple[ArmSeconds, ...] = ()
    policy_state: bytes
    heard: int | None = None
    """Decision point whose answer the policy's state is of; 0: of none. None: an older esperd did not keep it."""
    refused: tuple[RefusedArm, ...]
    policy_unavailable: int
    unavailable: tuple[UnavailableArm, ...] = ()
    watch: Watch
    """What the governor knows."""
    decision_points: int
    rolled_back: tuple[str, ...]
    """What was rolled back since the policy was last asked."""
    look: int
    """Steps since the governor was last shown any; their losses are in the tensors."""
    evidence: EvidenceSnapshot | None = None
    """What the policy was given of other jobs' experience."""
    slot_bytes: tuple[int | None, ...] = ()
    """Bytes of a sample's tensor at each slot, as far as they were seen since the last decision point."""
    point: RunState | None = None
    """Where the governor would take the run back to; its tensors are among this one's, named ``point.*``. None: nowhere, or to
    where this one stands: a run that goes on between two epochs keeps a point of there before it takes a step.
    """


class FinishedGrowth(msgspec.Struct, frozen=True, kw_only=True):
    """What the growth phase left, kept while the control runs."""

    metrics: Metrics
    artifacts: tuple[Artifact, ...]
    run: RunState
    attribution: Attribution | None
    """None: not made."""


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """A job between two attempts."""

    format: int
    job_digest: str
    """SHA-256 of the job: a checkpoint is only resumed by the job that wrote it."""
    data_fingerprint: str | None
    run: RunState
    finished: FinishedGrowth | None
    """Set while the control runs."""


def encode(state: SessionState, tensors: dict[str, torch.Tensor]) -> bytes:
    """Checkpoint bytes. The RNG streams of this thread's process are added."""
    held = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in _unshared(tensors).items()}
    held |= {f"rng.{name}": stream for name, stream in rng_streams().items()}
    text = base64.b64encode(msgspec.msgpack.encode(state)).decode()
    return safetensors.torch.save(held, metadata={METADATA_KEY: text})


def decode(data: bytes) -> tuple[SessionState, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State, tensors and RNG streams (``cpu``, ``cuda``) of a checkpoint.

    Raises:
        CheckpointRejected: when it is malformed or of another format version.
    """
    try:
        header_size = int.from_bytes(data[:8], "little")
        header = msgspec.json.decode(data[8 : 8 + header_size], type=dict[str, dict[str, object]])
        packed = base64.b64decode(str(header["__metadata__"][METADATA_KEY]))
        version = msgspec.msgpack.decode(packed, type=dict[str, Any]).get("format")
        if version != FORMAT:
            raise CheckpointRejected(f"the checkpoint has format {version}; this esperd reads {FORMAT}", format=str(version))
        state = msgspec.msgpack.decode(packed, type=SessionState)
        held = safetensors.torch.load(data)
    except (msgspec.MsgspecError, safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"the checkpoint is malformed: {error}") from error
    tensors = {name.removeprefix("state."): tensor for name, tensor in held.items() if name.startswith("state.")}
    streams = {name.removeprefix("rng."): tensor for name, tensor in held.items() if name.startswith("rng.")}
    if "cpu" not in streams:
        raise CheckpointRejected("the checkpoint is malformed: it holds no RNG stream")
    return state, tensors, streams


def seed_rng(rng_seed: int) -> None:
    """Seed every stream a user's model or data may draw from: torch's, Python's and numpy's global ones."""
    torch.manual_seed(rng_seed)
    random.seed(rng_seed)
    np.random.seed(rng_seed % 2**32)


def rng_streams() -> dict[str, torch.Tensor]:
    """Every random stream of this process as tensors: torch's (``cpu``, ``cuda``), Python's and numpy's global ones."""
    streams = {**_foreign_streams(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch does not annotate it
        streams["cuda"] = torch.cuda.get_rng_state()
    return streams


def _foreign_streams() -> dict[str, torch.Tensor]:
    """Python's and numpy's global streams as tensors."""
    _, python, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy_place": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor(float(cached), dtype=torch.float64),
    }


def _maybe(value: torch.Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def restore_rng(streams: dict[str, torch.Tensor]) -> None:
    """Put the RNG streams back where the checkpoint left them."""
    torch.set_rng_state(streams["cpu"])
    random.setstate((PYTHON_RNG_VERSION, tuple(streams["python"].tolist()), _maybe(streams["python_gauss"])))
    position, has_gauss = streams["numpy_place"].tolist()
    keys = streams["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(streams["numpy_gauss"])))
    if "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"])


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied parameters share storage, which safetensors refuses: the second name gets a copy."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return unshared
