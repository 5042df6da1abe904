"""Out again as a ``torch.export`` program: ``model.pt2``, which needs torch and neither esperd nor the host's code.

Only the batch may vary. Other sizes are as in the sample: a program that is dynamic in them has silently been specialised by the
exporter before, and slots have one shape anyway.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esperd.errors import ExportRejected
from esperd.growth.network import GrowingNetwork
from esperd.growth.outputs import prediction
from esperd.growth.parity import BATCH_SIZES, Inputs, Parity, Sample, answers, compare, inputs_of, rows
from esperd.growth.plain import plain_module

FILE = "model.pt2"

TOLERANCE = 1e-5
"""Largest difference between network and program, relative to 1 + |output|. Both run the same operations, and mostly agree to
the bit; torch may take a fused path in one of them."""

BATCH = "batch"
"""Name of the dynamic dimension."""


@dataclass(frozen=True)
class Subject:
    """A network made ready to leave: on the CPU, evaluating, with what it answers."""

    model: nn.Module
    """Plain."""
    inputs: Inputs
    expected: dict[int, list[torch.Tensor]]
    """Its answers, by batch size."""
    dynamic_batch: bool


class Predicting(nn.Module):
    """A model that returns an object with ``logits``, as one that returns them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The model's prediction."""
        return prediction(self.model(*inputs))


def subject(network: GrowingNetwork, sample: Sample, *, dynamic_batch: bool) -> Subject:
    """Make a network ready. The network itself is not touched.

    Raises:
        ExportRejected: as in :func:`esperd.growth.plain.plain_module`, or the sample does not fit the network.
    """
    inputs = tuple(tensor.detach().cpu() for tensor in inputs_of(sample))
    own = len(inputs[0])
    sizes = tuple(sorted({*BATCH_SIZES, own})) if dynamic_batch else (own,)
    model = plain_module(network).cpu().eval()
    reference = copy.deepcopy(network).cpu().eval()
    try:
        expected = answers(reference, inputs, sizes)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            returned: object = reference.host(*inputs)
    except ExportRejected:
        raise
    except Exception as error:
        raise ExportRejected(f"the network does not take the sample: {type(error).__name__}: {error}") from error
    model = model if isinstance(returned, torch.Tensor) else Predicting(model)
    return Subject(model=model, inputs=inputs, expected=expected, dynamic_batch=dynamic_batch)


def trace(subject: Subject) -> torch.export.ExportedProgram:
    """Export a subject, unchecked. The program holds no sample: it may be somebody's data.

    Raises:
        ExportRejected: when torch cannot export it.
    """
    count = len(subject.inputs[0])
    if subject.dynamic_batch:
        count = max(count, 2)  # a batch of one would be taken for a constant
    shapes: tuple[Any, ...] | None = None
    if subject.dynamic_batch:
        shapes = tuple({0: torch.export.Dim(BATCH)} for _ in subject.inputs)
        shapes = (shapes,) if isinstance(subject.model, Predicting) else shapes  # it takes any number of inputs, as one argument
    try:
        # with gradients: without, torch's transformer layers take a fused path, around seeds, that nothing else runs
        with torch.enable_grad(), quiet():
            program = torch.export.export(subject.model, rows(subject.inputs, count), dynamic_shapes=shapes)
    except Exception as error:
        told = f"torch.export cannot export the network: {type(error).__name__}: {beginning(error)}"
        if subject.dynamic_batch:
            told += f". With dynamic_batch=False it is exported for batches of {len(subject.inputs[0])} alone, if at all"
        raise ExportRejected(told) from error
    program.example_inputs = None
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings: they are about torch's own internals and about packages it looked for. What counts is
    whether the result answers as the network does, and that is checked.
    """
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def beginning(error: BaseException) -> str:
    """The first lines of an exporter's message, which may run to pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600]


def export_program(network: GrowingNetwork, sample: Sample, *, dynamic_batch: bool = True) -> torch.export.ExportedProgram:
    """The grown network, evaluating, as a program of ATen operations; its parameters are named as in
    :func:`~esperd.growth.plain.plain_module`. Compared with the network at batch sizes 1, 2, 3 and the sample's.

    Args:
        network: its seeds must be fossilized.
        sample: (B, ...) inputs, or several with the same B.
        dynamic_batch: whether the program takes any batch size, or the sample's only.

    Raises:
        ExportRejected: it cannot be exported, or does not answer as the network does.
    """
    made = subject(network, sample, dynamic_batch=dynamic_batch)
    program = trace(made)
    compare(made.expected, program.module(), made.inputs, tolerance=TOLERANCE, what="the exported program")
    return program


def save_program(network: GrowingNetwork, sample: Sample, path: Path, *, dynamic_batch: bool = True) -> Parity:
    """Write :func:`export_program`'s program to a file. What is compared is the file, read again.

    ``torch.export.load(path).module()(x)`` runs it. Load only files you trust: torch reads them with pickle.

    Args:
        network: its seeds must be fossilized.
        sample: (B, ...) inputs, or several with the same B.
        path: ends in ``.pt2``; replaced when it exists, and only by a file that was compared.
        dynamic_batch: as in :func:`export_program`.

    Raises:
        ExportRejected: it cannot be exported, or does not answer as the network does.
        OSError: when the file cannot be written.
    """
    made = subject(network, sample, dynamic_batch=dynamic_batch)
    program = trace(made)
    with written_whole(path) as place:
        with quiet():
            torch.export.save(program, place)
            again = torch.export.load(place).module()
        largest = compare(made.expected, again, made.inputs, tolerance=TOLERANCE, what=path.name)
    return Parity(
        form="torch.export",
        file=path.name,
        batch_sizes=tuple(made.expected),
        largest_difference=largest,
        tolerance=TOLERANCE,
        runtime=f"torch {torch.__version__}",
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file, and files beside it, that take their place at ``path`` when nothing was raised.

    Those beside it go first: whoever finds the file finds what belongs to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        place = Path(scratch) / path.name
        yield place
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file == place):
            file.replace(path.parent / file.name)
