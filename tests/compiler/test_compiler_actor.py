"""The compiling actor: compiles beside the event loop, and says what it refuses."""

from __future__ import annotations

import sys
import threading

import anyio
import msgspec
import pytest

import esperd.compiler.actor
from esperd.actors.spec import ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.compiler.actor import CompilerActor
from esperd.compiler.keys import kernel_key
from esperd.errors import KernelRejected, UnknownName
from esperd.execution import load_kernel
from esperd.messages.kernels import CompileKernel
from esperd.plugins import load_plugins


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture
def key(plugins):
    return kernel_key(plugins.blueprints["mlp_low_rank"], (7,))


@pytest.mark.asyncio
async def test_it_answers_with_a_kernel_that_loads(plugins, key):
    answer = await CompilerActor(plugins).handle(CompileKernel(key=key))
    assert answer.manifest.key == key
    assert load_kernel(answer.graph, answer.weights)


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_it_compiles(plugins, key, monkeypatch):
    started, loop_went_on = threading.Event(), threading.Event()
    real = esperd.compiler.actor.compile_kernel

    def compile_once_the_loop_went_on(*arguments):
        started.set()
        assert loop_went_on.wait(timeout=30)
        return real(*arguments)

    monkeypatch.setattr(esperd.compiler.actor, "compile_kernel", compile_once_the_loop_went_on)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(CompilerActor(plugins).handle, CompileKernel(key=key))
        while not started.is_set():
            await anyio.lowlevel.checkpoint()
        loop_went_on.set()


@pytest.mark.asyncio
async def test_a_blueprint_nobody_registered_is_named_with_what_there_is(plugins, key):
    with pytest.raises(UnknownName, match=r"'nothing'; there are: bottleneck"):
        await CompilerActor(plugins).handle(CompileKernel(key=msgspec.structs.replace(key, blueprint="nothing")))


@pytest.mark.asyncio
async def test_a_key_of_other_sources_is_refused(plugins, key):
    with pytest.raises(KernelRejected, match=r"other sources"):
        await CompilerActor(plugins).handle(CompileKernel(key=msgspec.structs.replace(key, source="0" * 64)))


@pytest.mark.asyncio
async def test_its_own_process_answers_over_the_socket_and_goes_on_after_a_refusal(tmp_path, plugins, key):
    compiler = ProcessSpec(
        name="compiler",
        command=[sys.executable, "-m", "esperd.compiler"],
        environment={"OMP_NUM_THREADS": "1", "ESPERD__PLUGINS__BLOCKED": '["some-plugin"]'},
    )
    async with ActorSystem(workers_endpoint=f"ipc://{tmp_path}/workers.sock") as system:
        await system.start(compiler)
        with pytest.raises(UnknownName):
            await system.ask("compiler", CompileKernel(key=msgspec.structs.replace(key, blueprint="nothing")))
        answer = await system.ask("compiler", CompileKernel(key=key), timeout_s=60)
        await system.stop("compiler")
    assert answer.manifest.key == key
    assert load_kernel(answer.graph, answer.weights)
