from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from esperd.actors.actor import Actor, handles
from esperd.actors.breaker import Breaker, Limits
from esperd.actors.clock import SystemClock
from esperd.actors.spec import ChildSpec
from esperd.actors.system import ActorSystem
from esperd.cache.actor import COMPILER_TROUBLE, CacheActor
from esperd.cache.index import MIGRATIONS, KernelIndex
from esperd.cache.seal import Seal
from esperd.errors import BlueprintRejected, CircuitOpen, HandlerFailed, WorkerFailed
from esperd.messages import Done
from esperd.messages.control import BreakerState
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
async def started(directory, context: CompilerContext, breaker=None):
    async with Database.open(directory / "k.db", MIGRATIONS) as database:
        actor = CacheActor(
            KernelIndex(database),
            Blobs(directory / "blobs"),
            Seal.open(directory / "seal.key"),
            memory_bytes=1_000,
            compile_timeout_s=77.0,
            breaker=breaker,
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
async def test_a_dead_compiler_is_not_asked_for_every_seed_and_kernels_that_are_there_are_provided_meanwhile(tmp_path):
    now = [0.0]
    breaker = Breaker("compiler", Limits(failures=2, reset_s=30.0), lambda: now[0], COMPILER_TROUBLE)
    context = CompilerContext(MADE)
    async with started(tmp_path, context, breaker) as actor:
        await actor.handle(ProvideKernel(key=KEY, job="j1"))
        context.answer = WorkerFailed("compiler was killed by SIGSEGV")
        others = [msgspec.structs.replace(KEY, blueprint=f"other{number}") for number in range(5)]
        for other, refusal in zip(others[:4], [WorkerFailed, WorkerFailed, CircuitOpen, CircuitOpen], strict=True):
            with pytest.raises(refusal):
                await actor.handle(ProvideKernel(key=other, job="j1"))
        assert len(context.asked) == 3
        assert (await actor.handle(ProvideKernel(key=KEY, job="j2"))).source == "memory"
        now[0] = 30.0
        context.answer = BlueprintRejected("no gradient")  # it lives
        with pytest.raises(BlueprintRejected):
            await actor.handle(ProvideKernel(key=others[4], job="j1"))
        assert breaker.status().state is BreakerState.CLOSED


@pytest.mark.asyncio
async def test_an_answer_that_is_no_kernel_is_named(tmp_path):
    async with started(tmp_path, CompilerContext(Done())) as actor:
        with pytest.raises(HandlerFailed, match="compiler answered CompileKernel with a Done"):
            await actor.handle(ProvideKernel(key=KEY, job="j1"))


class SlowCompiler(Actor):
    """Compiles what it is asked for once it is released."""

    def __init__(self):
        self.asked = []
        self.begun, self.release = anyio.Event(), anyio.Event()

    @handles(CompileKernel)
    async def compile(self, message):
        self.asked.append(message.key)
        self.begun.set()
        await self.release.wait()
        return msgspec.structs.replace(MADE, manifest=msgspec.structs.replace(MADE.manifest, key=message.key))


@pytest.mark.asyncio
async def test_while_a_kernel_compiles_others_are_provided_and_listed_and_it_is_compiled_once(tmp_path):
    compiler, sources = SlowCompiler(), []
    other = msgspec.structs.replace(KEY, blueprint="slow")

    async def ask(system):
        sources.append((await system.ask("cache", ProvideKernel(key=other, job="j1"))).source)

    async with started(tmp_path, CompilerContext(MADE)) as actor:
        await actor.handle(ProvideKernel(key=KEY, job="j1"))
        async with ActorSystem() as system, anyio.create_task_group() as tasks:
            await system.start(ChildSpec("compiler", lambda: compiler))
            await system.start(ChildSpec("cache", lambda: actor))
            for _ in range(2):
                tasks.start_soon(ask, system)
            await compiler.begun.wait()
            with anyio.fail_after(5):
                assert (await system.ask("cache", ProvideKernel(key=KEY, job="j2"))).source == "disk"
                assert [row.key for row in (await system.ask("cache", ListKernels())).kernels] == [KEY]
            assert sources == []
            compiler.release.set()
    assert sorted(sources) == ["compiled", "memory"]
    assert compiler.asked == [other]
