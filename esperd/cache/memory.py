"""The first tier: verified kernels in memory, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from esperd.messages.kernels import KernelManifest


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel whose bytes were checked against its manifest."""

    manifest_id: str
    manifest: KernelManifest
    graph: bytes
    weights: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of graph and weights."""
        return len(self.graph) + len(self.weights)


class KernelMemory:
    """Kernels by the digest of their key.

    Args:
        capacity_bytes: graphs and weights kept at most; a kernel larger than that is not kept. 0 keeps none.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kernels)

    def get(self, digest: str) -> Kernel | None:
        """The kernel, which counts as used now; None when it is not here."""
        kernel = self._kernels.get(digest)
        if kernel is not None:
            self._kernels.move_to_end(digest)
        return kernel

    def put(self, digest: str, kernel: Kernel) -> None:
        """Keep a kernel, and drop the least recently used ones until all fit."""
        replaced = self._kernels.pop(digest, None)
        if replaced is not None:
            self.size_bytes -= replaced.size_bytes
        if kernel.size_bytes > self.capacity_bytes:
            return
        self._kernels[digest] = kernel
        self.size_bytes += kernel.size_bytes
        while self.size_bytes > self.capacity_bytes:
            _, dropped = self._kernels.popitem(last=False)
            self.size_bytes -= dropped.size_bytes
