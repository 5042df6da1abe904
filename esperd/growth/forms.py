"""The forms an export can be written in besides ``model.safetensors``, made from the files of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from esperd.errors import ExportRejected, UnknownName
from esperd.growth import onnx, portable
from esperd.growth.card import write_card
from esperd.growth.export import SampleSpec, load, read
from esperd.growth.network import GrowingNetwork
from esperd.growth.parity import Parity

Writer = Callable[[GrowingNetwork, torch.Tensor, Path], Parity]

WRITERS: dict[str, tuple[str, Writer]] = {
    "pt2": (portable.FILE, portable.save_program),
    "onnx": (onnx.FILE, onnx.export_onnx),
}
"""File and writer by form."""

SAMPLES = 4
"""Rows of the sample that forms are traced with and compared on."""


def write_forms(
    directory: Path,
    forms: Sequence[str],
    *,
    host: nn.Module | Callable[..., nn.Module] | None = None,
    import_host: bool = False,
) -> tuple[Parity, ...]:
    """Write an export in other forms, beside it, and tell of them in its card.

    Each is compared with the network and whole, or not written; those before one that fails stay.

    Args:
        directory: holds ``model.safetensors`` and ``growth.json``.
        forms: names among :data:`WRITERS`.
        host: as in :func:`esperd.growth.export.load`.
        import_host: as in :func:`esperd.growth.export.load`.

    Returns:
        What each was compared on, in the order of ``forms``.

    Raises:
        UnknownName: there is no such form.
        MissingExtra: a form needs a package that is not installed; nothing is written then.
        ExportRejected: as in :func:`esperd.growth.export.load`, or a form cannot be written, or does not answer as the network
            does.
    """
    for form in forms:
        if form not in WRITERS:
            known = list(WRITERS)
            told = f"no form is called {form!r}; there are: {', '.join(known)}"
            raise UnknownName(told, kind="forms", name=form, available=known)
    if "onnx" in forms:
        onnx.require_packages()
    structure, _ = read(directory)
    network = load(directory, host=host, import_host=import_host)
    sample = drawn_sample(structure.input)
    written: list[Parity] = []
    for form in dict.fromkeys(forms):
        file, write = WRITERS[form]
        written.append(write(network, sample, directory / file))
        write_card(directory, written)
    return tuple(written)


def drawn_sample(spec: SampleSpec, count: int = SAMPLES) -> torch.Tensor:
    """Random inputs (B, ...) of a network, the same at every call: floating point between 0 and 1; integers 0 and 1, which every
    vocabulary has.

    Raises:
        ExportRejected: the specification names no dtype of torch.
    """
    dtype: object = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ExportRejected(f"the network takes {spec.dtype!r}, which is not a dtype of torch")
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(count, *spec.shape, generator=generator).to(dtype)
    return torch.randint(2, (count, *spec.shape), generator=generator).to(dtype)
