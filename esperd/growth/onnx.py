"""Out again as ONNX: ``model.onnx``, for runtimes other than torch. Needs ``pip install "esperd[onnx]"``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from esperd.errors import ExportRejected, MissingExtra
from esperd.growth.network import GrowingNetwork
from esperd.growth.parity import Parity, Sample, compare
from esperd.growth.portable import BATCH, Subject, beginning, quiet, subject, trace, written_whole

FILE = "model.onnx"

TOLERANCE = 1e-4
"""Largest difference between network and ONNX file, relative to 1 + |output|: another library sums in another order. Chosen, not
measured; on float32 convolutional networks 1e-6 is usual."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """See that the extra is installed.

    Raises:
        MissingExtra: it is not.
    """
    for package in PACKAGES:
        _package(package)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f'ONNX files need {name}: pip install "esperd[onnx]"', extra="onnx", package=name) from error


def export_onnx(
    network: GrowingNetwork, sample: Sample, path: Path, *, dynamic_batch: bool = True, tolerance: float = TOLERANCE
) -> Parity:
    """Write the grown network, evaluating, as an ONNX file, and compare what onnxruntime makes of it with the network.

    Inputs are named ``input`` (``input_0``, … when there are several), outputs ``output``. Weights above 2 GiB stand in a second
    file, ``<name>.data``.

    Args:
        network: its seeds must be fossilized.
        sample: (B, ...) inputs, or several with the same B. Compared at batch sizes 1, 2, 3 and B.
        path: replaced when it exists, and only by a file that was compared.
        dynamic_batch: whether the file takes any batch size, or the sample's only.
        tolerance: largest difference allowed, relative to 1 + |output|. Networks in half precision need more.

    Raises:
        MissingExtra: ``esperd[onnx]`` is not installed.
        ExportRejected: an operation has no ONNX form, onnxruntime cannot run the file, or it does not answer as the network does.
        OSError: when the file cannot be written.
    """
    require_packages()
    runtime = _package("onnxruntime")
    made = subject(network, sample, dynamic_batch=dynamic_batch)
    program = trace(made)
    names = _names("input", len(made.inputs))
    with written_whole(path) as place:
        _write(program, made, names, place)
        again = _loaded(runtime, place, names)
        largest = compare(made.expected, again, made.inputs, tolerance=tolerance, what=path.name)
    return Parity(
        form="onnx",
        file=path.name,
        batch_sizes=tuple(made.expected),
        largest_difference=largest,
        tolerance=tolerance,
        runtime=f"onnxruntime {runtime.__version__}",
    )


def _names(what: str, count: int) -> list[str]:
    return [what] if count == 1 else [f"{what}_{index}" for index in range(count)]


def _write(program: torch.export.ExportedProgram, made: Subject, names: list[str], place: Path) -> None:
    outputs = _names("output", len(next(iter(made.expected.values()))))
    shapes = tuple({0: BATCH} for _ in names) if made.dynamic_batch else None
    try:
        with quiet():
            written = torch.onnx.export(
                program, input_names=names, output_names=outputs, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
            assert written is not None  # noqa: S101 - what the exporter returns when it is given no file
            written.save(place)
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # the outermost says that something went wrong, the innermost what
        raise ExportRejected(f"the network has no ONNX form: {type(cause).__name__}: {beginning(cause)}") from error


def _loaded(runtime: Any, place: Path, names: list[str]) -> Callable[..., list[torch.Tensor]]:  # noqa: ANN401 - it has no types
    """The file, as something that takes tensors and returns them."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(place, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportRejected(f"onnxruntime cannot load what was written: {type(error).__name__}: {error}") from error

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run
