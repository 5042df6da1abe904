"""Kernels: what the trainer asks of the cache, the cache of the compiler, and the manifest that names everything."""

from __future__ import annotations

import hashlib

import msgspec

from esperd.messages.base import Message, Reply, Value

KERNEL_FORMAT = 1
"""Version of the portable form (graph JSON + safetensors + manifest)."""


class KernelKey(Value, frozen=True, kw_only=True, order=True):
    """What a kernel was compiled for. Two equal keys may share a kernel."""

    blueprint: str
    source: str
    """SHA-256 over the blueprint's declaration, distribution version and factory source: a new version is a new kernel."""
    shape: tuple[int, ...]
    """Shape of one sample, without batch."""
    dtype: str = "float32"
    device: str = "cpu"
    """Device type the self-test ran on: ``cpu`` or ``cuda``."""

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of this key; the cache's index."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class SelfTest(Value, frozen=True, kw_only=True):
    """How the kernel compared with the eager module before it was published."""

    batches: tuple[int, ...]
    """Batch sizes tried, in train and eval mode."""
    lengths: tuple[int, ...] = ()
    """Lengths of a sequence tried besides the shape's own; none where the shape is fixed."""
    max_abs_error: float
    """Largest absolute difference over outputs, input gradients, parameter gradients and buffers."""


class Profile(Value, frozen=True, kw_only=True):
    """Measured on the compiling machine, median over repeats, at the batch size named."""

    batch: int
    forward_us: float
    backward_us: float


class KernelManifest(Value, frozen=True, kw_only=True):
    """Everything that identifies a kernel. Its id is the SHA-256 of its canonical JSON."""

    format: int = KERNEL_FORMAT
    key: KernelKey
    graph_sha256: str
    weights_sha256: str
    parameters: int
    flops_per_sample: float
    """Forward FLOPs for one sample, counted on the eager module."""
    torch: str
    """Version of torch that produced it."""
    self_test: SelfTest
    profile: Profile

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces."""
        return msgspec.json.encode(self, order="deterministic")

    def identity(self) -> str:
        """SHA-256 of :meth:`encode`, in hexadecimal."""
        return hashlib.sha256(self.encode()).hexdigest()


class CompileKernel(Message, frozen=True, kw_only=True):
    """Ask the compiler for a kernel; answered by :class:`KernelCompiled` or a ``blueprint_rejected`` error."""

    key: KernelKey


class KernelCompiled(Reply, frozen=True, kw_only=True):
    """A validated, profiled kernel, not stored yet."""

    manifest: KernelManifest
    graph: bytes
    """Canonical JSON op list."""
    weights: bytes
    """safetensors: the weights the self-test ran with. Germination draws fresh ones."""
    seconds: float


class ProvideKernel(Message, frozen=True, kw_only=True):
    """Ask the cache for a kernel; on a miss the cache has it compiled and stores it first."""

    key: KernelKey
    job: str


class KernelProvided(Reply, frozen=True, kw_only=True):
    """A kernel whose bytes were verified against its manifest."""

    manifest_id: str
    manifest: KernelManifest
    graph: bytes
    weights: bytes
    source: str
    """Where it came from: ``memory``, ``disk`` or ``compiled``."""


class ListKernels(Message, frozen=True, kw_only=True):
    """Ask the cache what it holds."""


class KernelRow(Value, frozen=True, kw_only=True):
    """One kernel in the index."""

    manifest_id: str
    key: KernelKey
    parameters: int
    flops_per_sample: float
    size_bytes: int
    hits: int
    """Times it was provided without compiling."""
    created_at: float
    last_used_at: float
    profile: Profile


class KernelList(Reply, frozen=True, kw_only=True):
    """The cache's index and its counters since the daemon started."""

    kernels: tuple[KernelRow, ...]
    hits: int
    misses: int
    quarantined: int
