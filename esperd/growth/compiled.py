"""Training passes through ``torch.compile``: one program for each structure, bounded, counted, and never given up in silence.

What a compiler makes of a network holds for one structure: a seed that is blended in, heard whole or culled asks for another
program. Alpha does not: it is a tensor. Nor do silent seeds, which the traced code never meets, nor a smaller last batch: the
batch is marked as a size that varies. A structure that comes back (the host's own, after a cull) finds its program again.

A pass is one graph or none. Where the compiler cannot look through the host, where it fails, or where the limit is reached, the
passes of that structure run eager from then on; :class:`Compiled` says so with the reason, once for each structure.

All of torch's private compiler API that esperd uses stands in this module, but for the marks by which
:mod:`esperd.growth.host` tells a module that was compiled elsewhere.
"""

from __future__ import annotations

import time
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from esperd.errors import CompileUnavailable
from esperd.growth.network import GrowingNetwork, Presence, Seed
from esperd.growth.runner import Forward

LIMIT = 32
"""Graphs that one network's training may have compiled; a seed that is kept needs two. On two slow cores a small network's graph
took 16 to 160 s with an empty cache, measured; the limit is chosen, not measured."""

LIMIT_OF_STRUCTURE = 6
"""Graphs that one structure may have compiled. Three serve every batch size: torch 2.13 takes other convolutions on a CPU from 16
samples on, and a single sample is a case of its own; the others are for a second axis that varies. A host that counts its passes
in a plain number would ask for one at every step. Chosen, not measured."""

Backend = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]
"""Makes a function of a graph, as ``torch.compile`` wants it."""

Heard = tuple[tuple[str, Presence, bool], ...]
"""Every seed that is heard: name, how, and whether the host is kept from adapting to it. What a program is compiled for."""


@dataclass(frozen=True)
class Compilation:
    """One pass for which something was compiled: the first of a structure, or one whose shapes no graph of it fits."""

    structure: str
    graphs: int
    """Graphs compiled for it, now."""
    seconds: float
    """How long the pass took, the compiler's work included."""


@dataclass(frozen=True)
class Fallback:
    """A structure whose passes run eager."""

    structure: str
    reason: str


@dataclass(frozen=True)
class Compilations:
    """What was compiled so far."""

    structures: int
    graphs: int
    seconds: float
    """In passes that waited for the compiler."""
    fallbacks: tuple[Fallback, ...]


class LimitReached(Exception):
    """As many graphs as may be were compiled."""


NOTHING_COMPILED = "it ran without compiling anything, as it does when TORCH_COMPILE_DISABLE is set"


class Compiled:
    """Runs the host's training passes compiled; a :class:`~esperd.growth.runner.Runner`.

    While FLOPs are counted the network itself runs: the counter does not see into compiled code.

    Args:
        backend: name of a backend of ``torch.compile``, or one.
        device: where the network lives; None: the CPU.
        limit: graphs that may be compiled; after that, what was compiled goes on, and everything new runs eager.
        tell: is told of every compilation and every structure given up, as it happens.
        clock: seconds, monotonic.

    Raises:
        CompileUnavailable: when the backend cannot compile a sum here: there is no such backend, no C++ compiler, or
            ``torch.compile`` is switched off. Found out at once, not in the middle of a training.
    """

    records = False
    """Second passes run whole: a graph that handed out what the host computed on the way would be another graph, which rounds
    otherwise; then the host would not train to the bit as it does without a seed behind it."""

    def __init__(
        self,
        backend: str | Backend = "inductor",
        *,
        device: torch.device | None = None,
        limit: int = LIMIT,
        tell: Callable[[Compilation | Fallback], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit = limit
        self._backend = _tried(backend, device or torch.device("cpu"))
        self._tell = tell
        self._clock = clock
        self._programs: dict[Heard, _Program] = {}
        self._structures = 0
        self._graphs = 0
        self._seconds = 0.0
        self._fallbacks: dict[Heard, Fallback] = {}

    @property
    def compilations(self) -> Compilations:
        """What was compiled so far."""
        return Compilations(self._structures, self._graphs, self._seconds, tuple(self._fallbacks.values()))

    def forward(self, network: GrowingNetwork, structure: str, *, counted: bool) -> Forward:  # noqa: ARG002 - by name alone, blended and whole look alike
        """The program of the network's structure, or the network itself where passes run eager."""
        if counted:
            return network
        heard = _heard(network)
        if heard in self._fallbacks:
            return network
        program = self._programs.get(heard)
        if program is None or program.network is not network:
            why_not = self._why_not(heard)
            if why_not:
                self._give_up(heard, why_not)
                return network
            self._forget_the_dead(network)
            program = self._programs[heard] = _Program(network, f"forward of {_told(heard)}", self._compile_graph)

        def run(inputs: torch.Tensor) -> torch.Tensor:
            return self._run(program, heard, inputs)

        return run

    def taught(self, seed: Seed) -> None:
        """Nothing to do."""

    # --- one pass --------------------------------------------------------------------------------------------------------

    def _run(self, program: _Program, heard: Heard, inputs: torch.Tensor) -> torch.Tensor:
        graphs, began = self._graphs, self._clock()
        try:
            output = program(inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            # a program is one graph, so nothing of the pass has run; what the user's own code does wrong, it does again below
            del self._programs[heard]
            self._give_up(heard, _reason(error))
            return program.network(inputs)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        if self._graphs > graphs:
            seconds = self._clock() - began
            self._seconds += seconds
            self._tell(Compilation(_told(heard), self._graphs - graphs, seconds))
        elif program.graphs == 0:
            self._give_up(heard, NOTHING_COMPILED)
        return output

    def _compile_graph(self, program: _Program, graph: fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """The backend, counted: ``torch.compile`` calls it once for each graph."""
        if self._graphs >= self.limit:
            raise LimitReached(self._limit_reached())
        if program.graphs >= LIMIT_OF_STRUCTURE:
            raise LimitReached(f"it asks for more than {LIMIT_OF_STRUCTURE} graphs: something else than its batch size varies")
        function = self._backend(graph, examples)
        self._structures += program.graphs == 0
        program.graphs += 1
        self._graphs += 1
        return function

    # --- where passes run eager ------------------------------------------------------------------------------------------

    def _why_not(self, heard: Heard) -> str:
        taught = [name for name, presence, _ in heard if presence == "taught"]
        if taught:
            return f"{taught[0]} is taught straight-through, from a fork of the random streams, which compiled code cannot make"
        return self._limit_reached() if self._graphs >= self.limit else ""

    def _limit_reached(self) -> str:
        return f"{self.limit} graphs were compiled, more may not be"

    def _give_up(self, heard: Heard, reason: str) -> None:
        fallback = self._fallbacks[heard] = Fallback(_told(heard), reason)
        self._tell(fallback)

    def _forget_the_dead(self, network: GrowingNetwork) -> None:
        """Drop programs of structures that cannot come back: one of their seeds is gone."""
        living = {seed.name for seed in network.seeds()}
        self._programs = {
            heard: program for heard, program in self._programs.items() if living.issuperset(name for name, _, _ in heard)
        }


class _Program:
    """The pass of one structure, on a code object of its own. Calling it compiles what is not compiled yet.

    What was compiled goes with it: Dynamo's tables would keep it, and all that it refers to, for as long as the process runs.
    """

    def __init__(
        self,
        network: GrowingNetwork,
        name: str,
        compile_graph: Callable[[_Program, fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]],
    ) -> None:
        self.network = network
        self.graphs = 0
        self._compile_graph = compile_graph
        asking = weakref.ref(self)  # Dynamo keeps every backend it ever saw

        def backend(graph: fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
            program = asking()
            assert program is not None  # noqa: S101 - it is being called
            return program._compile_graph(program, graph, examples)

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = network(inputs)
            return output

        own = _on_its_own(forward, name)
        self._compiled = torch.compile(own, backend=backend, fullgraph=True)
        weakref.finalize(self, torch._C._dynamo.eval_frame.reset_code, own.__code__).atexit = False

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, ...) → the prediction."""
        torch._dynamo.maybe_mark_dynamic(inputs, 0)  # "maybe": a host that needs one batch size is compiled for each
        output: torch.Tensor = self._compiled(inputs)
        return output


def _on_its_own(function: Forward, name: str) -> types.FunctionType:
    """A plain function on a code object that nobody else has.

    Dynamo keeps what it compiled at the code object, looks through all of it at each call, and gives up after eight
    recompilations: so structures share neither that limit nor that search.
    """
    assert isinstance(function, types.FunctionType)  # noqa: S101 - both callers define it themselves
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name, None, function.__closure__)


def _heard(network: GrowingNetwork) -> Heard:
    return tuple((seed.name, seed.presence, seed.isolated) for seed in network.seeds() if seed.presence != "silent")


def _told(heard: Heard) -> str:
    """A structure in words: ``host``, or ``stage1#3 blended, stage2#1 whole``."""
    told = (f"{name} {presence}{' isolated' if isolated else ''}" for name, presence, isolated in heard)
    return ", ".join(told) or "host"


def _tried(backend: str | Backend, device: torch.device) -> Backend:
    """The backend, after it has compiled the smallest thing there is.

    Raises:
        CompileUnavailable: with what it said.
    """
    calls = 0

    def counting(graph: fx.GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        nonlocal calls
        calls += 1
        return found(graph, examples)

    def smallest(x: torch.Tensor) -> torch.Tensor:
        return x + 1.0

    try:
        found = cast("Backend", torch._dynamo.lookup_backend(backend)) if isinstance(backend, str) else backend
        torch.compile(_on_its_own(smallest, "smallest"), backend=counting, fullgraph=True)(torch.zeros(2, device=device))
        told = "" if calls else NOTHING_COMPILED
    except RuntimeError as error:  # which all of the compiler's errors are
        told = _reason(error)
    if told:
        raise CompileUnavailable(
            f"torch.compile with backend {backend!r} does not work on {device.type} here: {told.rstrip('.')}. On a CPU inductor "
            "needs a C++ compiler in the PATH (g++, or what CXX names), on CUDA Triton; or train without compiling",
            backend=str(backend),
            device=device.type,
        )
    return found


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    told = lines[0] if lines else "no reason given"
    return told if isinstance(inner, LimitReached) or type(inner).__name__ in told else f"{type(inner).__name__}: {told}"
