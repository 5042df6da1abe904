"""What a blueprint promises, checked on the real module: it keeps the shape, starts as identity, can learn, costs what it says.

Run before a blueprint is trusted, and by ``esper plugins check``. Every promise is checked and reported with the numbers
seen; one broken promise does not hide another.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from esperd.declarations import OPEN_DIMENSIONS, Blueprint, Shape, resolve
from esperd.errors import BlueprintRejected
from esperd.growth import promises
from esperd.growth.flops import count_flops
from esperd.growth.operators import OPERATORS, operator
from esperd.growth.probe import move
from esperd.growth.promises import Broken
from esperd.growth.streams import forked
from esperd.messages.growth import SlotRecord, Topology

SHAPES: dict[Topology, tuple[Shape, ...]] = {
    "cnn": ((3, 8, 8), (16, 4, 4), (17, 5, 7)),
    "mlp": ((3,), (16,), (33,)),
    "transformer": ((4, 8), (7, 16), (5, 33)),
}
"""Shapes a blueprint is checked at when none are given: few and many channels, odd ones, square and not."""

BATCHES = (1, 2, 5)
LENGTHS = (1, 2, 11)
"""Sequences that a seed for transformers must take besides the shape's own: one token, few, more than it was built for."""
TRAINING_BATCH = 32
CLASSES = 4
GRADIENT_STEPS = 3
"""By this step every parameter must have had a gradient: one step for a zero-initialised layer, one for what stands before
it, one to spare."""
STEP_SIZES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Learning rates tried, largest first, for one step that lowers the loss: the promise is a direction, not a rate."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise at one shape."""

    name: str
    shape: Shape
    passed: bool
    detail: str
    """What was seen, with its numbers."""
    operator: str = ""
    """Through which the seed entered; empty for checks of the module alone."""

    @property
    def title(self) -> str:
        """The promise, with its operator."""
        return f"{self.name} ({self.operator})" if self.operator else self.name


@dataclass(frozen=True, kw_only=True)
class ContractReport:
    """Every check of one blueprint."""

    blueprint: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every promise is kept."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, in order."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_for_failures(self) -> None:
        """Do nothing when every promise is kept.

        Raises:
            BlueprintRejected: when one is not; names each failed check with its shape and numbers.
        """
        if self.failures:
            told = "; ".join(f"{check.title} at {check.shape}: {check.detail}" for check in self.failures)
            raise BlueprintRejected(
                f"blueprint {self.blueprint!r} breaks its contract: {told}",
                blueprint=self.blueprint,
                checks=[check.name for check in self.failures],
            )


def check_blueprint(blueprint: Blueprint, shapes: Sequence[Shape] | None = None, seed: int = 0) -> ContractReport:
    """Check a blueprint's contract.

    The checks, at each shape: ``builds``, ``has_parameters``, ``parameter_formula``, ``shape`` (shape, dtype and device kept at
    several batch sizes, for transformers also at other lengths), ``input_kept``, ``finite``, ``deterministic``, ``independent``,
    ``streams``, ``causal`` (transformers), ``exports`` (at the first shape that gets there: structure rarely hangs on the
    shape, and one export takes as long as all other checks of a shape), ``identity`` (entered at alpha 0, the host's output to
    the bit), ``flop_formula``, ``gradient`` (the incubation loss at alpha 1 gives some parameter a gradient at step 1 and every
    one by step 3), ``learns`` (one step lowers the loss). Those of a forward pass stand in :mod:`esperd.growth.promises`.
    Identity, gradient and learning are looked at through every operator. For a blueprint that declares ``deterministic=False``,
    ``deterministic`` and ``independent`` are not made. When the module does not build, does not keep the shape or writes to its
    input, checks that need that are not made.

    Args:
        blueprint: the declaration.
        shapes: of one sample; None: :data:`SHAPES` of the blueprint's topology.
        seed: of weights and data; the process's generators are left as they were.

    Raises:
        ImportFailed: when the factory cannot be imported.
    """
    factory = resolve(blueprint.factory)
    checks: list[Check] = []
    for shape in SHAPES[blueprint.topology] if shapes is None else shapes:
        export = all(check.name != "exports" for check in checks)
        with forked(torch.device("cpu")):
            torch.manual_seed(seed)
            checks.extend(_check_shape(blueprint, factory, tuple(shape), export=export))
    return ContractReport(blueprint=blueprint.name, checks=tuple(checks))


def _check_shape(blueprint: Blueprint, factory: Callable[[Shape], nn.Module], shape: Shape, *, export: bool) -> list[Check]:
    checks: list[Check] = []

    def check(name: str, promise: Callable[[], str], operator: str = "") -> bool:
        passed, detail = False, ""
        try:
            passed, detail = True, promise()
        except Broken as broken:
            detail = str(broken)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a foreign module raises is the result of its check
            detail = f"{type(error).__name__}: {error}"
        checks.append(Check(name=name, shape=shape, operator=operator, passed=passed, detail=detail))
        return passed

    built: list[nn.Module] = []
    if not check("builds", lambda: _build(factory, shape, built)):
        return checks
    module = built[0]
    has_parameters = check("has_parameters", lambda: _has_parameters(module))
    check("parameter_formula", lambda: _parameter_formula(blueprint, module, shape))
    if not check("shape", lambda: _keeps_shape(module, shape, blueprint.topology)):
        return checks
    stirred = promises.stirred(module)
    if not check("input_kept", lambda: promises.input_kept(stirred, shape, BATCHES)):
        return checks  # the other checks use a tensor again after a pass: they would tell what torch says of a tensor written to
    check("finite", lambda: _finite(module, shape))
    if blueprint.deterministic and check("deterministic", lambda: promises.deterministic(stirred, shape)):
        check("independent", lambda: promises.independent(stirred, shape))  # what differs from itself differs alone too
    check("streams", lambda: promises.streams(stirred, shape, may_draw_in_evaluation=not blueprint.deterministic))
    if blueprint.topology == "transformer":
        check("causal", lambda: promises.causal(stirred, shape))
    if export:
        check("exports", lambda: promises.exports(blueprint, module, shape))
    check("flop_formula", lambda: _flop_formula(blueprint, module, shape))
    incubation = _Incubation(shape)
    for name in OPERATORS:
        entering = _Entering(module, name, blueprint.topology, shape)
        check("identity", functools.partial(_identity, entering, shape), name)
        if has_parameters:
            check("gradient", functools.partial(_gradient, entering, incubation), name)
            check("learns", functools.partial(_learns, entering, incubation), name)
    return checks


class _Entering(nn.Module):
    """A blueprint's module and the operator through which it enters."""

    def __init__(self, module: nn.Module, name: str, topology: Topology, shape: Shape) -> None:
        super().__init__()
        self.module = module
        record = SlotRecord(slot="contract", topology=topology, shape=shape, dtype="float32", module="")
        self.operator = operator(name, record)

    def forward(self, x: Tensor, alpha: float) -> Tensor:
        """(B, ...) → (B, ...), entered at ``alpha``."""
        entered: Tensor = self.operator(x, self.module(x), alpha)
        return entered


def _build(factory: Callable[[Shape], nn.Module], shape: Shape, built: list[nn.Module]) -> str:
    module: object = factory(shape)
    if not isinstance(module, nn.Module):
        raise Broken(f"the factory returned {type(module).__name__}, not a torch.nn.Module")
    built.append(module)
    return type(module).__name__


def _has_parameters(module: nn.Module) -> str:
    count = _count(module)
    if count == 0:
        raise Broken("it has no parameters, so there is nothing to train")
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise Broken(f"parameters that do not train: {', '.join(frozen)}; make them buffers")
    return f"{count} parameters"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parameter_formula(blueprint: Blueprint, module: nn.Module, shape: Shape) -> str:
    claimed, counted = blueprint.parameters(shape), _count(module)
    if claimed != counted:
        raise Broken(f"the formula says {claimed}, the module has {counted}")
    return f"{counted} parameters"


def _flop_formula(blueprint: Blueprint, module: nn.Module, shape: Shape) -> str:
    candidate = copy.deepcopy(module).eval()
    with torch.no_grad():
        _, flops = count_flops(lambda: candidate(torch.randn(2, *shape)))
    claimed, counted = blueprint.flops(shape), flops / 2
    if claimed != counted:
        raise Broken(f"the formula says {claimed:g} FLOPs a sample, the module takes {counted:g}")
    return f"{counted:g} FLOPs a sample"


def _modes(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy in training and one in evaluation."""
    return copy.deepcopy(module).train(), copy.deepcopy(module).eval()


def _keeps_shape(module: nn.Module, shape: Shape, topology: Topology) -> str:
    lengths = (shape[0], *LENGTHS) if 1 in OPEN_DIMENSIONS[topology] else ()
    taken = [(batch, *shape) for batch in BATCHES] + [(2, length, *shape[1:]) for length in lengths[1:]]
    for candidate in _modes(module):
        for sizes in taken:
            x = torch.randn(*sizes)
            output: object = _pass(candidate, x)
            if not isinstance(output, Tensor):
                raise Broken(f"it returned {type(output).__name__}, not a tensor")
            if (output.shape, output.dtype, output.device) != (x.shape, x.dtype, x.device):
                raise Broken(
                    f"{tuple(x.shape)} {x.dtype} on {x.device} became {tuple(output.shape)} {output.dtype} on {output.device}"
                )
    kept = f"kept at batches {', '.join(map(str, BATCHES))}"
    return f"{kept}, lengths {', '.join(map(str, lengths))}" if lengths else kept


def _pass(module: nn.Module, x: Tensor) -> object:
    """One forward pass; what it raises names the input."""
    try:
        return module(x)
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise Broken(f"it fails on {tuple(x.shape)}: {type(error).__name__}: {error}") from error


def _finite(module: nn.Module, shape: Shape) -> str:
    largest = 0.0
    for candidate in _modes(module):
        for x in (torch.randn(5, *shape), torch.zeros(2, *shape), 100 * torch.randn(2, *shape)):
            output: Tensor = candidate(x).detach()
            broken = int((~torch.isfinite(output)).sum())
            if broken:
                raise Broken(f"{broken} of {output.numel()} outputs are not finite, for inputs up to {float(x.abs().max()):g}")
            largest = max(largest, float(output.abs().max()))
    return f"outputs up to {largest:g}"


def _identity(entering: _Entering, shape: Shape) -> str:
    for candidate in _modes(entering):
        for batch in BATCHES:
            x = torch.randn(batch, *shape)
            host = x.clone()
            blended = candidate(x, 0.0)
            if not torch.equal(blended, host):
                raise Broken(f"at alpha 0 the host's output changed by up to {float((blended - host).abs().max().detach()):g}")
    birth = float((candidate(host, 1.0) - host).abs().max().detach())  # in evaluation, the last of the modes
    return f"exact at alpha 0; at birth, at alpha 1, it moves the host's output by {birth:g}"


class _Incubation:
    """A frozen random readout and random labels: the smallest thing a seed can lower the loss of."""

    def __init__(self, shape: Shape) -> None:
        features = math.prod(shape)
        self.inputs = torch.randn(TRAINING_BATCH, *shape)  # (B, ...)
        self.labels = torch.arange(TRAINING_BATCH) % CLASSES  # (B,)
        self.readout = torch.randn(features, CLASSES) / math.sqrt(features)  # (features, classes)

    def loss(self, entering: nn.Module) -> Tensor:
        """Cross-entropy with the seed entered at alpha 1.

        In double precision: the first step of a seed with few parameters lowers it by less than single precision shows.
        """
        entered = entering(self.inputs, 1.0)
        return functional.cross_entropy(entered.flatten(1).double() @ self.readout.double(), self.labels)


def _gradient(entering: _Entering, incubation: _Incubation) -> str:
    candidate = copy.deepcopy(entering).train()
    waiting = {name for name, _ in candidate.named_parameters()}
    first = 0
    for step in range(1, GRADIENT_STEPS + 1):
        candidate.zero_grad()
        incubation.loss(candidate).backward()  # type: ignore[no-untyped-call]
        moving = {
            name
            for name, parameter in candidate.named_parameters()
            if parameter.grad is not None and bool((parameter.grad != 0).any())
        }
        broken = [
            name
            for name, parameter in candidate.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        if broken:
            raise Broken(f"at step {step} the gradient of {', '.join(broken)} is not finite")
        waiting -= moving
        if step == 1:
            first = len(moving)
            if not moving:
                raise Broken("at step 1 the gradient of every parameter is exactly zero: it can never learn")
        move(list(candidate.parameters()))
    if waiting:
        raise Broken(f"after {GRADIENT_STEPS} steps these had no gradient: {', '.join(sorted(waiting))}")
    return f"{first} of {len(list(candidate.parameters()))} tensors at step 1, all by step {GRADIENT_STEPS}"


def _learns(entering: _Entering, incubation: _Incubation) -> str:
    state = torch.get_rng_state()  # the same dropout masks before, in the step and after
    tried: list[str] = []
    for learning_rate in STEP_SIZES:
        candidate = copy.deepcopy(entering).train()
        optimizer = torch.optim.SGD(candidate.parameters(), lr=learning_rate)
        torch.set_rng_state(state)
        loss = incubation.loss(candidate)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        before = float(loss.detach())
        torch.set_rng_state(state)
        after = float(incubation.loss(candidate).detach())
        if after < before:
            return f"loss {before:g} → {after:g} in one step of {learning_rate:g}"
        tried.append(f"{after:g}")
    raise Broken(f"one step never lowers the loss from {before:g}: {', '.join(tried)}")
