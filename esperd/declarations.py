"""What plugins declare. Torch-free: a declaration names its code as ``"module:name"`` and workers resolve it.

A plugin's entry module imports no torch, so that the daemon stays light whatever is installed.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esperd.errors import ImportFailed
from esperd.messages.growth import Topology

Shape = tuple[int, ...]

GUARDED_STAGES = ("germinated", "training", "blending", "shadowing", "probationary", "fossilized")
"""Stages that are entered through a gate."""

TOPOLOGY_SHAPES: dict[Topology, str] = {"cnn": "(C, H, W)", "mlp": "(F,)", "transformer": "(T, D)"}
"""Shape of one sample's tensor at a slot, by topology."""

OPEN_DIMENSIONS: dict[Topology, tuple[int, ...]] = {"cnn": (0,), "mlp": (0,), "transformer": (0, 1)}
"""Dimensions of a batch at a slot whose sizes a kernel leaves open, by topology: the batch, and the length of a sequence, which
differs between training and the generation of a text."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A kind of seed.

    Args:
        name: unique among blueprints.
        topology: which slots it fits.
        factory: ``"module:name"`` of a callable taking the slot's shape (without batch) and returning an ``nn.Module`` that
            keeps that shape. The module is residual inside: it returns input plus its own delta.
        parameters: shape → number of parameters; must equal the true count.
        flops: shape → forward FLOPs for one sample, counting a multiply-add as two and only convolutions and matrix
            products (as ``torch.utils.flop_counter`` does).
        description: one line.
        source: paper or project the structure comes from.
        min_gradient_ratio: threshold of gate G2 for this blueprint; None: the job's.
        deterministic: whether two passes give equal outputs: in evaluation whatever the state of the random generator, in
            training from one state of it. Dropout keeps that; noise in evaluation does not. Where False, outputs are only
            held to be finite.
    """

    name: str
    topology: Topology
    factory: str
    parameters: Callable[[Shape], int]
    flops: Callable[[Shape], float]
    description: str
    source: str
    min_gradient_ratio: float | None = None
    deterministic: bool = True


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to choose. ``decide`` names a function ``(request: Decide) -> Decided``: pure, torch-free, random only
    through ``request.rng_seed`` and ``request.point``.
    """

    name: str
    decide: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A way to tell when to grow. ``fires`` names a function ``(request: Decide) -> Signal``: pure, torch-free, random only
    through ``request.rng_seed`` and ``request.point``. Whatever it knows of the past it finds in the observation.
    """

    name: str
    fires: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check before a stage. ``check`` names a function ``(evidence, settings) -> Verdict``, pure; see
    :mod:`esperd.growth.gates`. Several may guard one stage: a seed enters when all of them pass.
    """

    name: str
    guards: str
    """The stage one enters through it: one of :data:`GUARDED_STAGES`."""
    check: str
    description: str

    def __post_init__(self) -> None:
        if self.guards not in GUARDED_STAGES:
            raise ValueError(f"gate {self.name!r} guards {self.guards!r}, must be one of: {', '.join(GUARDED_STAGES)}")


@dataclass(frozen=True, kw_only=True)
class SurgeryOperation:
    """A structural change a decision may ask for. ``apply`` names a function ``(grower, decision) -> str | None`` that
    completes, or returns why it refused, or raises; in the last two cases it leaves the network as it was. See
    :mod:`esperd.growth.surgery`.
    """

    name: str
    apply: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network that seeds can be grown in. ``factory`` names a function of keyword options returning an ``nn.Module``."""

    name: str
    factory: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Data by name. ``loader`` names a function of keyword options; see :mod:`esperd.trainer.data` for what it returns."""

    name: str
    loader: str
    description: str


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """A ramp. ``curve`` names a pure function of t in [0, 1] with curve(0) = 0 and curve(1) = 1, rising."""

    name: str
    curve: str
    description: str


Declaration = Blueprint | Strategy | Trigger | Gate | SurgeryOperation | Host | Dataset | AlphaSchedule


def resolve(reference: str) -> Any:  # noqa: ANN401 - whatever the module holds under that name
    """Import what ``"module:name"`` names.

    Raises:
        ImportFailed: when the reference is malformed, the module does not import, or it has no such name. A module that ends
            the interpreter while it is imported (``SystemExit``: a script without a guard) does not import either.
    """
    module_name, separator, attribute = reference.partition(":")
    if not separator or not module_name or not attribute:
        raise ImportFailed(f"{reference!r} is not of the form 'module:function'", reference=reference)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ImportFailed(
            f"{reference!r} could not be imported: {type(error).__name__}: {error}",
            reference=reference,
            traceback=traceback.format_exc(),
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportFailed(f"module {module_name!r} has no {attribute!r}", reference=reference)
        found = getattr(found, part)
    return found
