"""Kernels through their tiers: memory, then disk, then the compiler. Nothing is handed out that was not verified."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
import msgspec

from esperd.cache.index import IndexEntry, KernelIndex, KernelUsage
from esperd.cache.memory import Kernel, KernelMemory
from esperd.cache.seal import Seal
from esperd.errors import KernelRejected, StoreFailed
from esperd.messages.kernels import KernelCompiled, KernelKey, KernelList, KernelManifest, KernelProvided, KernelRow
from esperd.store.blobs import Blobs
from esperd.store.clock import Clock

Compile = Callable[[KernelKey], Awaitable[KernelCompiled]]


class KernelCache:
    """What the cache actor does, without the actor.

    Args:
        index: rows of what is on disk.
        blobs: the files.
        seal: of this installation.
        memory: the first tier.
        compile_kernel: the last resort; raises when a blueprint is rejected.
        clock: stamps creation and use.
    """

    def __init__(
        self, index: KernelIndex, blobs: Blobs, seal: Seal, memory: KernelMemory, compile_kernel: Compile, clock: Clock
    ) -> None:
        self._index = index
        self._blobs = blobs
        self._seal = seal
        self._memory = memory
        self._compile = compile_kernel
        self._clock = clock
        self._turns: dict[str, _Turn] = {}
        self._hits = 0
        self._misses = 0
        self._quarantined = 0

    async def provide(self, key: KernelKey) -> KernelProvided:
        """A kernel for this key. Whoever asks while it is being compiled waits for that compilation.

        Raises:
            BlueprintRejected: by the compiler.
            KernelRejected: when the compiler's answer contradicts itself.
            StoreFailed: when a new kernel cannot be stored.
        """
        digest = key.digest()
        turn = self._turns.setdefault(digest, _Turn())
        turn.askers += 1
        try:
            async with turn.lock:
                return await self._provide(key, digest)
        finally:
            turn.askers -= 1
            if not turn.askers:
                del self._turns[digest]

    async def list(self) -> KernelList:
        """Everything on disk that this installation sealed, and what happened since this cache was made.

        A row that is not intact is quarantined, as it would be when asked for.
        """
        kernels = []
        for entry, usage in await self._index.rows():
            try:
                manifest = self._verified_manifest(entry)
            except KernelRejected as error:
                await self._quarantine(entry, error.message)
            else:
                kernels.append(_kernel_row(entry, manifest, usage))
        return KernelList(kernels=tuple(kernels), hits=self._hits, misses=self._misses, quarantined=self._quarantined)

    async def _provide(self, key: KernelKey, digest: str) -> KernelProvided:
        kernel, source = self._memory.get(digest), "memory"
        if kernel is None:
            kernel, source = await self._load(digest), "disk"
        if kernel is not None:
            self._hits += 1
            await self._index.count_hit(kernel.manifest_id, self._clock())
        else:
            self._misses += 1
            kernel, source = await self._make(key, digest), "compiled"
        self._memory.put(digest, kernel)
        return KernelProvided(
            manifest_id=kernel.manifest_id,
            manifest=kernel.manifest,
            graph=kernel.graph,
            weights=kernel.weights,
            source=source,
        )

    async def _load(self, digest: str) -> Kernel | None:
        """The kernel from disk; None when there is none, or none that can be trusted: that one is quarantined."""
        entry = await self._index.find(digest)
        if entry is None:
            return None
        try:
            manifest = self._verified_manifest(entry)
            graph = await anyio.to_thread.run_sync(self._blobs.get, manifest.graph_sha256)
            weights = await anyio.to_thread.run_sync(self._blobs.get, manifest.weights_sha256)
        except (KernelRejected, StoreFailed) as error:
            # A damaged file was moved away by the blob store. Files of a manifest that cannot be trusted stay: it
            # might name somebody else's.
            await self._quarantine(entry, error.message)
            return None
        return Kernel(manifest_id=entry.manifest_id, manifest=manifest, graph=graph, weights=weights)

    async def _quarantine(self, entry: IndexEntry, reason: str) -> None:
        self._quarantined += 1
        await self._index.quarantine(entry, reason, self._clock())

    def _verified_manifest(self, entry: IndexEntry) -> KernelManifest:
        """The manifest, if this installation wrote it, for the key it is filed under.

        Raises:
            KernelRejected: when seal, id, form or key are not what they must be.
        """
        if not self._seal.is_intact(entry.manifest, entry.seal):
            raise KernelRejected(f"the seal of kernel {entry.manifest_id} is broken", manifest_id=entry.manifest_id)
        if hashlib.sha256(entry.manifest).hexdigest() != entry.manifest_id:
            raise KernelRejected(f"the manifest of kernel {entry.manifest_id} has another id", manifest_id=entry.manifest_id)
        try:
            manifest = msgspec.json.decode(entry.manifest, type=KernelManifest)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise KernelRejected(
                f"the manifest of kernel {entry.manifest_id} cannot be read: {error}", manifest_id=entry.manifest_id
            ) from error
        if manifest.key.digest() != entry.key_digest:
            raise KernelRejected(
                f"kernel {entry.manifest_id} is filed under a key it was not compiled for", manifest_id=entry.manifest_id
            )
        return manifest

    async def _make(self, key: KernelKey, digest: str) -> Kernel:
        """Compile, then store: files first, the row last."""
        compiled = await self._compile(key)
        _check_compiled(key, compiled)
        manifest = compiled.manifest.encode()
        kernel = Kernel(
            manifest_id=compiled.manifest.identity(),
            manifest=compiled.manifest,
            graph=compiled.graph,
            weights=compiled.weights,
        )
        await anyio.to_thread.run_sync(self._blobs.put, kernel.graph)
        await anyio.to_thread.run_sync(self._blobs.put, kernel.weights)
        entry = IndexEntry(manifest_id=kernel.manifest_id, key_digest=digest, manifest=manifest, seal=self._seal.sign(manifest))
        await self._index.add(entry, kernel.size_bytes, self._clock())
        return kernel


class _Turn:
    """One key's queue: a compilation at a time."""

    __slots__ = ("askers", "lock")

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.askers = 0


def _kernel_row(entry: IndexEntry, manifest: KernelManifest, usage: KernelUsage) -> KernelRow:
    return KernelRow(
        manifest_id=entry.manifest_id,
        key=manifest.key,
        parameters=manifest.parameters,
        flops_per_sample=manifest.flops_per_sample,
        size_bytes=usage.size_bytes,
        hits=usage.hits,
        created_at=usage.created_at,
        last_used_at=usage.last_used_at,
        profile=manifest.profile,
    )


def _check_compiled(key: KernelKey, compiled: KernelCompiled) -> None:
    """Refuse an answer of the compiler that does not fit the question or itself.

    Raises:
        KernelRejected: naming what does not fit.
    """
    manifest = compiled.manifest
    if manifest.key != key:
        raise KernelRejected(f"asked for {key}, the compiler made {manifest.key}", blueprint=key.blueprint)
    for name, data, expected in (
        ("graph", compiled.graph, manifest.graph_sha256),
        ("weights", compiled.weights, manifest.weights_sha256),
    ):
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise KernelRejected(
                f"the {name} of the compiled {key.blueprint} hash to {found}, its manifest says {expected}",
                blueprint=key.blueprint,
                expected=expected,
                found=found,
            )
