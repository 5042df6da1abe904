"""Out again: a grown network as ``model.safetensors`` and ``growth.json``, and back, without a daemon and without plugins.

Loading runs no code from the files: weights are safetensors, seeds are rebuilt from their op lists. The host is code, so a
host that is not built in is only imported when the caller says so, or handed in.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import nn

from esperd.declarations import resolve
from esperd.errors import EsperError, ExportRejected, InvalidSlot, UnknownName
from esperd.execution.oplist import load_kernel
from esperd.growth.alpha import Ramp
from esperd.growth.lifecycle import Life
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.operators import operator
from esperd.growth.plain import require_fossilized
from esperd.messages.growth import SlotRecord, Stage
from esperd.messages.reports import SeedOutcome

FORMAT = 2
WEIGHTS = "model.safetensors"
STRUCTURE = "growth.json"
BUILTIN_HOSTS = "esperd.builtins.networks."
"""Modules under this prefix ship with esperd. A function defined in one of them may be called on a file's word, and nothing
that such a module merely imports: ``…networks.cnn:torch.os.system`` would run a shell."""


class HostReference(msgspec.Struct, frozen=True, kw_only=True):
    """How the host is built."""

    factory: str
    """``module:function``."""
    options: dict[str, Any]


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the network takes."""

    shape: tuple[int, ...]
    """Of one sample, without batch."""
    dtype: str
    """Name of a torch dtype."""

    @classmethod
    def of(cls, batch: torch.Tensor) -> SampleSpec:
        """The specification of a batch (B, ...)."""
        return cls(shape=tuple(batch.shape[1:]), dtype=str(batch.dtype).removeprefix("torch."))


class ExportedSeed(msgspec.Struct, frozen=True, kw_only=True):
    """One fossilized seed."""

    name: str
    slot: SlotRecord
    blueprint: str
    alpha: float
    parameters: int
    flops_per_sample: float
    germinated_epoch: int
    kernel: str | None
    operator: str
    """How its output enters the slot: ``add``, ``multiply`` or ``gate``."""
    graph: str
    """Canonical JSON op list of its module."""


class GrowthFile(msgspec.Struct, frozen=True, kw_only=True):
    """``growth.json``."""

    format: int
    esperd: str
    torch: str
    host: HostReference
    input: SampleSpec
    slots: tuple[SlotRecord, ...]
    seeds: tuple[ExportedSeed, ...]
    history: tuple[SeedOutcome, ...]
    manifest: dict[str, Any]
    """Where it comes from: job, rng_seed, data, digest of the job."""
    weights_sha256: str


def encode(
    network: GrowingNetwork,
    *,
    host: HostReference,
    sample: SampleSpec,
    history: tuple[SeedOutcome, ...] = (),
    manifest: dict[str, Any] | None = None,
    version: str,
) -> tuple[bytes, bytes]:
    """Encode a grown network.

    Args:
        network: every seed in it must be fossilized and run on a portable kernel.
        host: how its host is built.
        sample: what it takes.
        history: how every seed that ever lived ended.
        manifest: provenance, plain values.
        version: version of esperd that writes it.

    Returns:
        The bytes of ``model.safetensors`` and of ``growth.json``.

    Raises:
        ExportRejected: a seed is still on trial, or has no portable kernel.
    """
    require_fossilized(network)
    for seed in network.seeds():
        if seed.graph is None:
            raise ExportRejected(f"seed {seed.name} runs as a plain module and has no portable kernel", seed=seed.name)
    weights = safetensors.torch.save(_unshared(network.state_dict()))
    structure = GrowthFile(
        format=FORMAT,
        esperd=version,
        torch=str(torch.__version__),
        host=host,
        input=sample,
        slots=network.slots,
        seeds=tuple(
            ExportedSeed(
                name=seed.name,
                slot=seed.record,
                blueprint=seed.blueprint,
                alpha=seed.alpha,
                parameters=seed.parameters_added,
                flops_per_sample=seed.flops_per_sample,
                germinated_epoch=seed.epoch,
                kernel=seed.kernel,
                operator=seed.operator_name,
                graph=seed.graph or "",
            )
            for seed in network.seeds()
        ),
        history=history,
        manifest=manifest or {},
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    return weights, msgspec.json.format(msgspec.json.encode(structure, order="deterministic"), indent=2)


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies: tied parameters share storage, which safetensors refuses."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def read(path: Path) -> tuple[GrowthFile, dict[str, torch.Tensor]]:
    """Read and verify an export.

    Args:
        path: the directory, or its ``growth.json``.

    Raises:
        ExportRejected: files missing or malformed, an unknown format version, a structure that contradicts itself, or weights
            that are not the ones described.
    """
    directory = path.parent if path.name == STRUCTURE else path
    try:
        text, weights = (directory / STRUCTURE).read_bytes(), (directory / WEIGHTS).read_bytes()
    except OSError as error:
        raise ExportRejected(f"{directory} holds no grown model: {error}", path=str(directory)) from error
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("format")
        if version != FORMAT:
            raise ExportRejected(f"{STRUCTURE} has format {version}; this esperd reads {FORMAT}", format=str(version))
        structure = msgspec.json.decode(text, type=GrowthFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ExportRejected(f"{directory / STRUCTURE} is malformed: {error}", path=str(directory)) from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != structure.weights_sha256:
        raise ExportRejected(
            f"{WEIGHTS} has SHA-256 {digest}, but {STRUCTURE} describes {structure.weights_sha256}", path=str(directory)
        )
    problem = _contradiction(structure)
    if problem:
        raise ExportRejected(f"{directory / STRUCTURE} contradicts itself: {problem}", path=str(directory))
    try:
        return structure, safetensors.torch.load(weights)
    # what the library raises on damaged headers, unknown dtypes and impossible shapes
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise ExportRejected(f"{WEIGHTS} is not safetensors: {error}", path=str(directory)) from error


def _contradiction(structure: GrowthFile) -> str:
    """What in a file does not hang together; empty when everything does."""
    slots = {record.slot: record for record in structure.slots}
    if len(slots) != len(structure.slots) or not all(slots):
        return "slots must have names of their own"
    names = {seed.name for seed in structure.seeds}
    if len(names) != len(structure.seeds):
        return "two seeds have the same name"
    for seed in structure.seeds:
        if slots.get(seed.slot.slot) != seed.slot:
            return f"seed {seed.name!r} stands at {seed.slot.slot!r}, which is not one of the slots"
        if not re.fullmatch(re.escape(seed.slot.slot) + r"#[0-9]{1,9}", seed.name):
            return f"{seed.name!r} is no name of a seed at {seed.slot.slot!r}"
        if not 0.0 <= seed.alpha <= 1.0:
            return f"seed {seed.name!r} has alpha {seed.alpha}"
    return ""


def load(
    path: str | Path, *, host: nn.Module | Callable[..., nn.Module] | None = None, import_host: bool = False
) -> GrowingNetwork:
    """Rebuild a grown network from an export. No daemon, no plugin, no blueprint code is needed.

    Args:
        path: the directory that holds ``model.safetensors`` and ``growth.json``, or its ``growth.json``.
        host: the host's module, or the function that builds it (called with the recorded options). Needed for a host that is
            not built in, unless ``import_host`` is true.
        import_host: import and call the ``module:function`` named in the file. Only for files you trust.

    Returns:
        The network in eval mode, on the CPU; its outputs equal the trained network's to the bit on the same machine.

    Raises:
        ExportRejected: malformed files, weights that do not match, or a host that must be given.
        KernelRejected: a seed's op list is not allowed.
    """
    structure, tensors = read(Path(path))
    with torch.random.fork_rng(devices=[]):
        built = _host(structure.host, host, import_host=import_host)
    try:
        network = GrowingNetwork(built, structure.slots)
    except InvalidSlot as error:
        raise ExportRejected(f"the host does not fit {STRUCTURE}: {error}", path=str(path)) from error
    for exported in structure.seeds:
        seed = Seed(
            name=exported.name,
            blueprint=exported.blueprint,
            module=load_kernel(exported.graph.encode(), None),
            record=exported.slot,
            parameters_added=exported.parameters,
            flops_per_sample=exported.flops_per_sample,
            epoch=exported.germinated_epoch,
            kernel=exported.kernel,
            graph=exported.graph,
            operator=_operator(exported),
            operator_name=exported.operator,
            alpha_target=exported.alpha,
        )
        seed.life = Life(stage=Stage.FOSSILIZED)
        seed.alpha, seed.ramp = exported.alpha, Ramp(target=exported.alpha)
        network.insert(seed)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ExportRejected(f"the weights do not fit the host: {error}", path=str(path)) from error
    return network.eval()


def _operator(exported: ExportedSeed) -> nn.Module:
    """Built from its name; its weights are loaded with the network's."""
    try:
        with torch.random.fork_rng(devices=[]):
            return operator(exported.operator, exported.slot)
    except (UnknownName, InvalidSlot) as error:
        raise ExportRejected(f"seed {exported.name!r} cannot be rebuilt: {error}", seed=exported.name) from error


def _host(reference: HostReference, given: nn.Module | Callable[..., nn.Module] | None, *, import_host: bool) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if given is None:
        builtin = reference.factory.startswith(BUILTIN_HOSTS)
        if not builtin and not import_host:
            raise ExportRejected(
                f"this model's host is {reference.factory!r}, which is not part of esperd. Pass host=<your module or function>, "
                "or import_host=True to import it by that name (only for files you trust)",
                host=reference.factory,
            )
        given = _builtin_host(reference.factory) if builtin and not import_host else resolve(reference.factory)
    try:
        host: object = given(**reference.options)
    except EsperError:
        raise
    except Exception as error:
        raise ExportRejected(
            f"host {reference.factory!r} could not be built with {reference.options}: {type(error).__name__}: {error}",
            host=reference.factory,
        ) from error
    if not isinstance(host, nn.Module):
        raise ExportRejected(
            f"host {reference.factory!r} returned {type(host).__name__}, not a torch.nn.Module", host=reference.factory
        )
    return host


def _builtin_host(factory: str) -> Callable[..., nn.Module]:
    module, _, name = factory.partition(":")
    function = resolve(factory) if name.isidentifier() else None
    if not inspect.isfunction(function) or function.__module__ != module:
        raise ExportRejected(f"{factory!r} is not a host that is part of esperd", host=factory)
    return function
