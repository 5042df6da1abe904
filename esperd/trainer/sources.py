"""Where data comes from: a registered name, an ``.npz`` file or the user's function."""

from __future__ import annotations

import inspect
import traceback
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from esperd.declarations import Dataset, resolve
from esperd.errors import EsperError, ImportFailed, InvalidData
from esperd.messages.jobs import Job
from esperd.trainer.samples import inputs_from

NPZ_SPLITS = ("train", "gate", "audit")
_PAIR = 2


def read_source(job: Job, datasets: Mapping[str, Dataset]) -> Any:  # noqa: ANN401 - a part, or a mapping of parts
    """Fetch what the job names: one part, or a mapping of split names to parts; pairs always as tuples of two.

    Raises:
        UnknownName: when no data set has the name.
        ImportFailed: when a loader does not import or raises.
        InvalidData: when a file cannot be read, an option does not exist, or something other than data comes back.
    """
    if job.data.endswith(".npz"):
        return _read_npz(Path(job.workdir) / job.data, job.data_options)
    reference = job.data if ":" in job.data else datasets[job.data].loader
    loaded = _call(reference, job.data_options)
    if callable(getattr(loaded, "divided", None)):
        loaded = _try(reference, lambda: loaded.divided(gate=job.split.gate, audit=job.split.audit))
    if isinstance(loaded, Mapping):
        return {name: _part(f"{reference} → {name!r}", part) for name, part in loaded.items()}
    return _part(reference, loaded)


def _call(reference: str, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the user's function returned
    function = resolve(reference)
    if not callable(function):
        raise ImportFailed(f"data {reference!r} is a {type(function).__name__}, not a function", reference=reference)
    _check_options(reference, function, options)
    return _try(reference, lambda: function(**options))


def _try(reference: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the user's function returned
    try:
        return work()
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        raise ImportFailed(
            f"data function {reference!r} raised {type(error).__name__}: {error}",
            reference=reference,
            traceback=traceback.format_exc(),
        ) from error


def _check_options(reference: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InvalidData(
            f"data_options {dict(options)} do not fit {reference}{signature}: {error}",
            reference=reference,
            key="data_options",
        ) from error


def _part(where: str, part: Any) -> Any:  # noqa: ANN401 - whatever the user's function returned
    if isinstance(part, TensorDataset) and len(part.tensors) == _PAIR:
        return part.tensors
    if isinstance(part, tuple | list):
        if len(part) != _PAIR:
            raise InvalidData(f"{where} must give a pair (x, y), not {len(part)} things", where=where)
        for values in part:
            if not hasattr(values, "__len__"):
                raise InvalidData(f"{where} must give arrays or tensors, not a {type(values).__name__}", where=where)
        return tuple(part)
    if not isinstance(part, np.ndarray | torch.Tensor) and hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        return part
    raise InvalidData(
        f"{where} gave a {type(part).__name__}; it must give (x, y), a dataset with a length and an index, or a mapping "
        "of train, gate and audit to one of these",
        where=where,
        returned=type(part).__name__,
    )


def _read_npz(path: Path, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a pair, or a mapping of pairs
    """Read ``x_train, y_train, x_gate, y_gate, x_audit, y_audit``, or ``x, y``.

    Options ``mean`` and ``std`` (a number, or one for each channel) normalise inputs after the conversion to float32.
    """
    unknown = sorted(set(options) - {"mean", "std"})
    if unknown:
        raise InvalidData(f"an .npz file takes the options mean and std, not {', '.join(unknown)}", key="data_options")
    try:
        with _archive(path) as file:
            names = set(file.files)
            if {"x", "y"} <= names:
                return _normalised("the data set", file["x"], options), file["y"]
            wanted = {f"{axis}_{split}" for axis in "xy" for split in NPZ_SPLITS}
            if not wanted <= names:
                raise InvalidData(
                    f"{path} holds {sorted(names)}; it must hold x and y, or {sorted(wanted)}",
                    path=str(path),
                    found=sorted(names),
                )
            return {
                split: (_normalised(f"the {split} split", file[f"x_{split}"], options), file[f"y_{split}"])
                for split in NPZ_SPLITS
            }
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror or error}", path=str(path)) from error
    except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidData(f"{path} is not an .npz file of plain arrays: {error}", path=str(path)) from error


def _archive(path: Path) -> np.lib.npyio.NpzFile:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):  # numpy goes by content: an .npy file of any name is an array
        raise InvalidData(
            f"{path} is a single array (an .npy file), not an .npz archive; write it with np.savez(path, x=..., y=...)",
            path=str(path),
        )
    return file


def _normalised(where: str, values: npt.NDArray[Any], options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - array or tensor
    if not options:
        return values
    x = inputs_from(where, values)
    if not x.is_floating_point() or x.ndim < _PAIR:
        raise InvalidData("mean and std need floating-point inputs with a channel axis", key="data_options")
    mean, std = _per_channel("mean", options.get("mean", 0.0), x), _per_channel("std", options.get("std", 1.0), x)
    if bool((std <= 0).any()):
        raise InvalidData(f"option std must be above 0, not {options['std']!r}", key="data_options")
    return (x - mean) / std


def _per_channel(option: str, value: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - from the job file
    """A number or C numbers → (1, 1 or C, 1, …), to be broadcast over (N, C, …)."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidData(
            f"option {option} must be a number or one for each channel, not {value!r}", key="data_options"
        ) from error
    if len(numbers) not in (1, x.shape[1]):
        raise InvalidData(f"option {option} has {len(numbers)} values for {x.shape[1]} channels", key="data_options")
    return numbers.reshape(1, -1, *[1] * (x.ndim - 2))
