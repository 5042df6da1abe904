"""What a kernel is compiled for, as a key. Torch-free: whoever asks for a kernel computes it."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import msgspec

import esperd
from esperd.declarations import Blueprint, Shape
from esperd.errors import BlueprintRejected, ImportFailed
from esperd.messages.kernels import KernelKey


def kernel_key(
    blueprint: Blueprint, shape: Shape, dtype: str = "float32", device: str = "cpu", distribution: str | None = None
) -> KernelKey:
    """Key of the kernel for this blueprint, shape, dtype and device.

    ``source`` covers the declaration (the formulas by their values at this shape), the distribution and the bytes of the file
    that holds the factory. What that file imports from elsewhere is covered by the distribution's version only.

    Args:
        blueprint: the declaration.
        shape: of one sample, without batch.
        dtype: name of a torch dtype.
        device: device type, ``cpu`` or ``cuda``.
        distribution: name and version of the package that registered the blueprint; None: esperd itself.

    Raises:
        BlueprintRejected: when a formula fails for this shape, or its result is no plain number.
        ImportFailed: when the factory's source file cannot be found or read.
    """
    try:
        formulas = msgspec.json.encode([blueprint.parameters(shape), blueprint.flops(shape)])
    except (Exception, SystemExit) as error:
        raise BlueprintRejected(
            f"a formula of blueprint {blueprint.name!r} fails for shape {shape}: {type(error).__name__}: {error}",
            blueprint=blueprint.name,
        ) from error
    declaration = [
        blueprint.name,
        blueprint.topology,
        blueprint.factory,
        blueprint.description,
        blueprint.source,
        blueprint.min_gradient_ratio,
        blueprint.deterministic,
        distribution or f"esperd {esperd.__version__}",
    ]
    digest = hashlib.sha256(msgspec.json.encode(declaration) + formulas)
    digest.update(_source(blueprint.factory))
    return KernelKey(blueprint=blueprint.name, source=digest.hexdigest(), shape=tuple(shape), dtype=dtype, device=device)


def _source(factory: str) -> bytes:
    """Bytes of the file that holds a factory; its parent packages are imported, the module itself is not."""
    module = factory.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ImportFailed(f"no source file of {module!r} was found", reference=factory)
        return Path(spec.origin).read_bytes()
    except (ImportError, OSError, ValueError) as error:
        raise ImportFailed(f"the source of {factory!r} cannot be read: {error}", reference=factory) from error
