"""The storing actor: provides kernels, and has the compiler make those it lacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from esperd.actors.actor import Actor, Context, handles
from esperd.actors.breaker import Breaker
from esperd.cache.index import KernelIndex
from esperd.cache.kernels import KernelCache
from esperd.cache.memory import KernelMemory
from esperd.cache.seal import Seal
from esperd.errors import ActorUnavailable, AskTimeout, HandlerFailed, WorkerFailed
from esperd.messages.kernels import (
    CompileKernel,
    KernelCompiled,
    KernelKey,
    KernelList,
    KernelProvided,
    ListKernels,
    ProvideKernel,
)
from esperd.store.blobs import Blobs

COMPILER = "compiler"
"""Name of the compiling actor."""

COMPILER_TROUBLE = (ActorUnavailable, AskTimeout, HandlerFailed, WorkerFailed)
"""What speaks against the compiler, and not against the blueprint that it was to compile."""

PROVIDED_AT_ONCE = 256
"""Kernels provided at one time, most of them waiting for the compiler; more are refused with ``busy``. Chosen, not measured."""


def _nobody_counts(_seconds: float) -> None:
    """Seconds of compilation go uncounted."""


class CacheActor(Actor):
    """Answers :class:`ProvideKernel` and :class:`ListKernels`.

    A kernel that is being compiled keeps only those waiting who asked for it: others are provided and listed meanwhile.

    Args:
        index: rows of what is on disk.
        blobs: the files.
        seal: of this installation.
        memory_bytes: capacity of the memory tier; it starts empty in every incarnation.
        compile_timeout_s: longest wait for the compiler.
        breaker: leaves a compiler alone that keeps failing; None: it is asked every time.
        compiled: told how many seconds the compiler took for a kernel, whenever it made one.
    """

    def __init__(
        self,
        index: KernelIndex,
        blobs: Blobs,
        seal: Seal,
        *,
        memory_bytes: int,
        compile_timeout_s: float,
        breaker: Breaker | None = None,
        compiled: Callable[[float], None] = _nobody_counts,
    ) -> None:
        self._index = index
        self._blobs = blobs
        self._seal = seal
        self._memory_bytes = memory_bytes
        self._compile_timeout_s = compile_timeout_s
        self._breaker = breaker
        self._compiled = compiled

    async def on_start(self, context: Context) -> None:
        """Open the tiers."""

        async def compile_kernel(key: KernelKey) -> KernelCompiled:
            with self._breaker.attempt() if self._breaker is not None else nullcontext():
                answer = await context.ask(COMPILER, CompileKernel(key=key), timeout_s=self._compile_timeout_s)
            if not isinstance(answer, KernelCompiled):
                raise HandlerFailed(f"{COMPILER} answered CompileKernel with a {type(answer).__name__}", actor=COMPILER)
            self._compiled(answer.seconds)
            return answer

        self._kernels = KernelCache(
            self._index, self._blobs, self._seal, KernelMemory(self._memory_bytes), compile_kernel, context.clock.wall
        )

    @handles(ProvideKernel, concurrent=PROVIDED_AT_ONCE)
    async def provide(self, message: ProvideKernel) -> KernelProvided:
        """From memory, disk or the compiler."""
        return await self._kernels.provide(message.key)

    @handles(ListKernels)
    async def list_kernels(self, _message: ListKernels) -> KernelList:
        """What is on disk, and this incarnation's counters."""
        return await self._kernels.list()
