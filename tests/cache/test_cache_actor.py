from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager

import pytest

from esperd.actors.clock import SystemClock
from esperd.cache.actor import CacheActor
from esperd.cache.index import MIGRATIONS, KernelIndex
from esperd.cache.seal import Seal
from esperd.errors import BlueprintRejected, HandlerFailed
from esperd.messages import Done
from esperd.messages.kernels import (
    CompileKernel,
    KernelCompiled,
    KernelKey,
    KernelManifest,
    ListKernels,
    Profile,
    ProvideKernel,
    SelfTest,
)
from esperd.store.blobs import Blobs
from esperd.store.database import Database

KEY = KernelKey(blueprint="conv", source="s" * 64, shape=(8, 4, 4))
MADE = KernelCompiled(
    manifest=KernelManifest(
        key=KEY,
        graph_sha256=hashlib.sha256(b"graph").hexdigest(),
        weights_sha256=hashlib.sha256(b"weights").hexdigest(),
        parameters=10,
        flops_per_sample=20.0,
        torch="2.13.0",
        self_test=SelfTest(batches=(1, 2), max_abs_error=0.0),
        profile=Profile(batch=16, forward_us=1.0, backward_us=2.0),
    ),
    graph=b"graph",
    weights=b"weights",
    seconds=0.1,
)


class CompilerContext:
    """A context whose compiler gives one answer."""

    name = "cache"
    generation = 1
    clock = SystemClock()

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked = []

    async def ask(self, to, message, timeout_s=30.0):
        self.asked.append((to, message, timeout_s))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@asynccontextmanager
async def started(directory, context: CompilerContext):
    async with Database.open(directory / "k.db", MIGRATIONS) as database:
        actor = CacheActor(
            KernelIndex(database),
            Blobs(directory / "blobs"),
            Seal.open(directory / "seal.key"),
            memory_bytes=1_000,
            compile_timeout_s=77.0,
        )
        await actor.on_start(context)
        yield actor


@pytest.mark.asyncio
async def test_a_missing_kernel_is_asked_of_the_compiler_once_and_listed(tmp_path):
    context = CompilerContext(MADE)
    async with started(tmp_path, context) as actor:
        provided = [await actor.handle(ProvideKernel(key=KEY, job="j1")) for _ in range(2)]
        listed = await actor.handle(ListKernels())
    assert context.asked == [("compiler", CompileKernel(key=KEY), 77.0)]
    assert [kernel.source for kernel in provided] == ["compiled", "memory"]
    assert [(row.key, row.hits, row.profile) for row in listed.kernels] == [(KEY, 1, MADE.manifest.profile)]


@pytest.mark.asyncio
async def test_the_compilers_refusal_reaches_the_asker(tmp_path):
    async with started(tmp_path, CompilerContext(BlueprintRejected("no gradient"))) as actor:
        with pytest.raises(BlueprintRejected, match="no gradient"):
            await actor.handle(ProvideKernel(key=KEY, job="j1"))


@pytest.mark.asyncio
async def test_an_answer_that_is_no_kernel_is_named(tmp_path):
    async with started(tmp_path, CompilerContext(Done())) as actor:
        with pytest.raises(HandlerFailed, match="compiler answered CompileKernel with a Done"):
            await actor.handle(ProvideKernel(key=KEY, job="j1"))
