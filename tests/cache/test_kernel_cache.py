from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from esperd.cache.index import MIGRATIONS, KernelIndex
from esperd.cache.kernels import KernelCache
from esperd.cache.memory import KernelMemory
from esperd.cache.seal import Seal
from esperd.errors import BlueprintRejected, KernelRejected
from esperd.messages.kernels import KernelCompiled, KernelKey, KernelManifest, Profile, SelfTest
from esperd.store.blobs import Blobs
from esperd.store.database import Database

CONV = KernelKey(blueprint="conv", source="s" * 64, shape=(8, 4, 4))
DENSE = KernelKey(blueprint="dense", source="t" * 64, shape=(16,))


def compiled(key: KernelKey, graph: bytes | None = None, weights: bytes = b"weights") -> KernelCompiled:
    graph = graph or f"graph of {key.blueprint}".encode()
    manifest = KernelManifest(
        key=key,
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        parameters=10,
        flops_per_sample=20.0,
        torch="2.13.0",
        self_test=SelfTest(batches=(1, 2), max_abs_error=0.0),
        profile=Profile(batch=16, forward_us=1.0, backward_us=2.0),
    )
    return KernelCompiled(manifest=manifest, graph=graph, weights=weights, seconds=0.1)


@dataclass
class CountingCompiler:
    """Answers at once unless its gate is closed."""

    asked: list[KernelKey] = field(default_factory=list)
    heard: asyncio.Queue[KernelKey] = field(default_factory=asyncio.Queue)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    answer: object = None

    def __post_init__(self):
        self.gate.set()

    async def __call__(self, key: KernelKey) -> KernelCompiled:
        self.asked.append(key)
        self.heard.put_nowait(key)
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or compiled(key)


@dataclass
class House:
    cache: KernelCache
    compiler: CountingCompiler
    database: Database
    blobs: Blobs


@asynccontextmanager
async def opened(directory, memory_bytes: int = 1_000_000, now: float = 1000.0):
    compiler = CountingCompiler()
    blobs = Blobs(directory / "blobs")
    async with Database.open(directory / "k.db", MIGRATIONS) as database:
        cache = KernelCache(
            KernelIndex(database),
            blobs,
            Seal.open(directory / "seal.key"),
            KernelMemory(memory_bytes),
            compiler,
            lambda: now,
        )
        yield House(cache, compiler, database, blobs)


@pytest.mark.asyncio
async def test_a_kernel_is_compiled_once_then_comes_from_memory_then_after_a_restart_from_disk(tmp_path):
    async with opened(tmp_path) as house:
        first = await house.cache.provide(CONV)
        second = await house.cache.provide(CONV)
    async with opened(tmp_path) as house:
        third = await house.cache.provide(CONV)
        assert house.compiler.asked == []
    assert [kernel.source for kernel in (first, second, third)] == ["compiled", "memory", "disk"]
    made = compiled(CONV)
    for kernel in (first, second, third):
        assert (kernel.manifest, kernel.graph, kernel.weights) == (made.manifest, made.graph, made.weights)
        assert kernel.manifest_id == made.manifest.identity()


@pytest.mark.asyncio
async def test_hits_and_times_are_kept_over_restarts_and_counters_are_not(tmp_path):
    async with opened(tmp_path, now=1.0) as house:
        for key in (CONV, DENSE, CONV):
            await house.cache.provide(key)
        assert (await house.cache.list()).misses == 2
    async with opened(tmp_path, now=2.0) as house:
        await house.cache.provide(CONV)
        listed = await house.cache.list()
    assert [(row.key, row.hits, row.created_at, row.last_used_at) for row in listed.kernels] == [
        (CONV, 2, 1.0, 2.0),
        (DENSE, 0, 1.0, 1.0),
    ]
    assert [row.size_bytes for row in listed.kernels] == [len(b"graph of convweights"), len(b"graph of denseweights")]
    assert (listed.hits, listed.misses, listed.quarantined) == (1, 0, 0)


@pytest.mark.asyncio
async def test_everybody_who_asks_at_once_gets_the_one_kernel_that_is_compiled(tmp_path):
    async with opened(tmp_path) as house:
        house.compiler.gate.clear()
        asking = [asyncio.create_task(house.cache.provide(CONV)) for _ in range(5)]
        await house.compiler.heard.get()
        other = asyncio.create_task(house.cache.provide(DENSE))
        assert await house.compiler.heard.get() == DENSE  # a compilation blocks nobody who wants another kernel
        house.compiler.gate.set()
        kernels = await asyncio.gather(*asking, other)
    assert house.compiler.asked == [CONV, DENSE]
    assert sorted(kernel.source for kernel in kernels) == ["compiled", "compiled", *["memory"] * 4]


@pytest.mark.asyncio
async def test_when_the_first_asker_gives_up_the_next_one_is_still_served(tmp_path):
    async with opened(tmp_path) as house:
        house.compiler.gate.clear()
        impatient = asyncio.create_task(house.cache.provide(CONV))
        await house.compiler.heard.get()
        patient = asyncio.create_task(house.cache.provide(CONV))
        await asyncio.sleep(0)
        impatient.cancel()
        house.compiler.gate.set()
        assert (await patient).source == "compiled"


@pytest.mark.asyncio
async def test_a_rejected_blueprint_is_the_askers_error_and_nothing_is_stored(tmp_path):
    async with opened(tmp_path) as house:
        house.compiler.answer = BlueprintRejected("conv is not identity at alpha 0")
        with pytest.raises(BlueprintRejected, match="not identity"):
            await house.cache.provide(CONV)
        assert (await house.cache.list()).kernels == ()
        house.compiler.answer = None
        assert (await house.cache.provide(CONV)).source == "compiled"


@pytest.mark.asyncio
async def test_a_compiler_that_contradicts_itself_is_refused(tmp_path):
    good = compiled(CONV)
    lies = [
        (compiled(DENSE), "the compiler made"),
        (KernelCompiled(manifest=good.manifest, graph=b"other", weights=good.weights, seconds=0.0), "the graph of"),
        (KernelCompiled(manifest=good.manifest, graph=good.graph, weights=b"other", seconds=0.0), "the weights of"),
    ]
    async with opened(tmp_path) as house:
        for answer, complaint in lies:
            house.compiler.answer = answer
            with pytest.raises(KernelRejected, match=complaint):
                await house.cache.provide(CONV)
        assert (await house.cache.list()).kernels == ()


async def damage_graph(house: House) -> None:
    house.blobs.path(compiled(CONV).manifest.graph_sha256).write_bytes(b"graph of evil")


async def lose_weights(house: House) -> None:
    house.blobs.path(compiled(CONV).manifest.weights_sha256).unlink()


async def forge_manifest(house: House) -> None:
    forged = compiled(CONV, graph=b"evil")
    house.blobs.put(forged.graph)
    row = (forged.manifest.encode(), forged.manifest.identity())
    await house.database.write(lambda c: c.execute("UPDATE kernels SET manifest = ?, manifest_id = ?", row))


async def break_seal(house: House) -> None:
    await house.database.write(lambda c: c.execute("UPDATE kernels SET seal = x'00'"))


async def rename_row(house: House) -> None:
    await house.database.write(lambda c: c.execute("UPDATE kernels SET manifest_id = ?", ("0" * 64,)))


@pytest.mark.asyncio
@pytest.mark.parametrize("harm", [damage_graph, lose_weights, forge_manifest, break_seal, rename_row])
async def test_a_kernel_that_was_tampered_with_is_quarantined_counted_and_compiled_again(tmp_path, harm):
    async with opened(tmp_path) as house:
        await house.cache.provide(CONV)
        await harm(house)
    async with opened(tmp_path) as house:
        again = await house.cache.provide(CONV)
        assert (again.source, again.graph) == ("compiled", b"graph of conv")
        listed = await house.cache.list()
        assert (len(listed.kernels), listed.misses, listed.quarantined) == (1, 1, 1)
        assert len(await house.database.read("SELECT reason FROM quarantined_kernels WHERE reason <> ''")) == 1
    async with opened(tmp_path) as house:
        assert (await house.cache.provide(CONV)).source == "disk"


@pytest.mark.asyncio
async def test_a_sealed_kernel_filed_under_another_key_is_not_handed_out(tmp_path):
    async with opened(tmp_path) as house:
        await house.cache.provide(DENSE)
        await house.database.write(lambda c: c.execute("UPDATE kernels SET key_digest = ?", (CONV.digest(),)))
    async with opened(tmp_path) as house:
        assert (await house.cache.provide(CONV)).graph == b"graph of conv"
        assert (await house.cache.list()).quarantined == 1


@pytest.mark.asyncio
async def test_the_files_a_forged_manifest_names_are_left_alone(tmp_path):
    async with opened(tmp_path) as house:
        await house.cache.provide(CONV)
        foreign = house.blobs.put(b"a checkpoint of a job")
        forged = compiled(CONV, graph=b"a checkpoint of a job").manifest.encode()
        await house.database.write(lambda c: c.execute("UPDATE kernels SET manifest = ?", (forged,)))
    async with opened(tmp_path) as house:
        await house.cache.provide(CONV)
        assert house.blobs.get(foreign) == b"a checkpoint of a job"


@pytest.mark.asyncio
async def test_listing_shows_only_intact_kernels(tmp_path):
    async with opened(tmp_path) as house:
        await house.cache.provide(CONV)
        await house.cache.provide(DENSE)
        await house.database.write(
            lambda c: c.execute("UPDATE kernels SET manifest = x'00' WHERE key_digest = ?", (CONV.digest(),))
        )
        listed = await house.cache.list()
    assert ([row.key for row in listed.kernels], listed.quarantined) == ([DENSE], 1)


@pytest.mark.asyncio
async def test_under_another_installations_key_nothing_is_trusted(tmp_path):
    async with opened(tmp_path) as house:
        await house.cache.provide(CONV)
    (tmp_path / "seal.key").unlink()
    async with opened(tmp_path) as house:
        assert (await house.cache.provide(CONV)).source == "compiled"


@pytest.mark.asyncio
async def test_a_kernel_too_large_for_memory_comes_from_disk(tmp_path):
    async with opened(tmp_path, memory_bytes=0) as house:
        assert [(await house.cache.provide(CONV)).source for _ in range(2)] == ["compiled", "disk"]
