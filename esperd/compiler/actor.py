"""The compiling actor: one kernel at a time, in a worker thread, so that its mailbox and heartbeat go on."""

from __future__ import annotations

import importlib

import anyio.to_thread
import structlog
import torch

from esperd.actors.actor import Actor, Context, handles
from esperd.compiler.compile import compile_kernel
from esperd.compiler.keys import kernel_key
from esperd.errors import KernelRejected
from esperd.messages.kernels import CompileKernel, KernelCompiled, KernelKey
from esperd.plugins import Plugins

log = structlog.get_logger(__name__)


class CompilerActor(Actor):
    """Answers :class:`~esperd.messages.kernels.CompileKernel`. It stores nothing: the cache does.

    Args:
        plugins: where blueprints are looked up.
    """

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    async def on_start(self, context: Context) -> None:
        """Import what the first export would wait for, beside the first messages."""
        context.start_soon(anyio.to_thread.run_sync, _import_exporter)

    @handles(CompileKernel)
    async def compile(self, message: CompileKernel) -> KernelCompiled:
        """Compile, validate and profile a kernel.

        Raises:
            UnknownName: when no blueprint of this name is registered here.
            KernelRejected: when the key was computed from other sources than are installed here, or names a dtype or device
                that cannot be compiled for.
            BlueprintRejected: when the blueprint breaks its contract or has no portable form.
            ImportFailed: when its factory cannot be imported.
        """
        kernel = await anyio.to_thread.run_sync(self._compile, message.key)
        log.info("compiled a kernel", blueprint=message.key.blueprint, shape=message.key.shape, seconds=kernel.seconds)
        return kernel

    def _compile(self, key: KernelKey) -> KernelCompiled:
        # What the main thread set does not bind a new thread's OpenMP; two threads on a busy machine wait for each other.
        torch.set_num_threads(1)
        blueprint = self._plugins.blueprints[key.blueprint]
        distribution = self._plugins.distribution_of("blueprints", key.blueprint)
        here = kernel_key(blueprint, key.shape, key.dtype, key.device, distribution)
        if here.source != key.source:
            raise KernelRejected(
                f"the key of {key.blueprint!r} was computed from other sources than the compiler sees"
                f" ({distribution or 'built in'}); restart the daemon after changing a plugin",
                blueprint=key.blueprint,
                asked=key.source,
                here=here.source,
            )
        return compile_kernel(key, blueprint)


def _import_exporter() -> None:
    """Load what ``torch.export`` imports at its first use; 1.3 s, measured."""
    for module in ("torch.export._trace", "torch._dynamo"):
        importlib.import_module(module)
