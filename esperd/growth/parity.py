"""Parity: whether what left answers as the network does, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch

from esperd.errors import ExportRejected

Inputs = tuple[torch.Tensor, ...]
Sample = torch.Tensor | Inputs
"""What a network takes: one tensor (B, ...), or several with the same B."""

BATCH_SIZES = (1, 2, 3)
"""Compared besides the sample's own: tracing treats a batch of one, and sometimes of two, as a case of its own."""


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was compared with the network and found to answer alike."""

    form: str
    """``torch.export`` or ``onnx``."""
    file: str
    """Its name."""
    batch_sizes: tuple[int, ...]
    """At which both were run."""
    largest_difference: float
    """Between any two outputs, relative to 1 + |output|."""
    tolerance: float
    """Largest difference that is allowed."""
    runtime: str
    """What ran the file, with its version."""


def inputs_of(sample: Sample) -> Inputs:
    """The inputs of a sample.

    Raises:
        ExportRejected: no tensor, or tensors that do not start with one and the same batch of at least 1.
    """
    inputs = (sample,) if isinstance(sample, torch.Tensor) else sample
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if not shapes or not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
        raise ExportRejected(f"a sample is one tensor (B, ...), or several with the same B, B ≥ 1; this one has shapes {shapes}")
    return inputs


def rows(inputs: Inputs, count: int) -> Inputs:
    """``count`` rows of a batch (B, ...), again from the first where there are not so many."""
    return tuple(tensor[torch.arange(count, device=tensor.device) % len(tensor)] for tensor in inputs)


def answers(network: Callable[..., object], inputs: Inputs, sizes: Sequence[int]) -> dict[int, list[torch.Tensor]]:
    """What a network returns, without gradients, for the sample's rows in batches of several sizes.

    The RNG stream of the CPU is left as it was, so that every network that is asked draws the same numbers.
    """
    told: dict[int, list[torch.Tensor]] = {}
    for size in sizes:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            told[size] = leaves(network(*rows(inputs, size)))
    return told


def leaves(output: object) -> list[torch.Tensor]:
    """The tensors in an output: one, or tuples, lists and mappings of them.

    Raises:
        ExportRejected: it holds anything else.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [leaf for part in output.values() for leaf in leaves(part)]
    if isinstance(output, (tuple, list)):
        return [leaf for part in output for leaf in leaves(part)]
    raise ExportRejected(f"the network returns {type(output).__name__}; only tensors can be compared and exported")


def compare(
    expected: Mapping[int, list[torch.Tensor]],
    other: Callable[..., object],
    inputs: Inputs,
    *,
    tolerance: float,
    what: str,
) -> float:
    """Run something on the same inputs and compare.

    Args:
        expected: what the network answered, by batch size.
        other: what should answer alike.
        inputs: the sample.
        tolerance: largest difference allowed, relative to 1 + |output|; 0: equal to the bit.
        what: names ``other`` in messages.

    Returns:
        The largest difference.

    Raises:
        ExportRejected: it differs by more, answers with other shapes or dtypes, or fails.
    """
    largest = 0.0
    for size, wanted in expected.items():
        try:
            given = answers(other, inputs, (size,))[size]
        except Exception as error:
            told = f"{what} fails at batch size {size}, where the network does not: {type(error).__name__}: {error}"
            raise ExportRejected(told, batch_size=size) from error
        kinds, wanted_kinds = ([(tuple(one.shape), str(one.dtype)) for one in answer] for answer in (given, wanted))
        if kinds != wanted_kinds:
            told = f"{what} answers a batch of {size} with {kinds}, the network with {wanted_kinds}"
            raise ExportRejected(told, batch_size=size)
        differences = [difference(mine, theirs) for mine, theirs in zip(wanted, given, strict=True)]
        worst = max(differences, default=0.0)
        if worst > tolerance:
            raise ExportRejected(
                f"{what} does not answer as the network does: at batch size {size} they differ by {worst:.1e}"
                f" (relative to 1 + |output|; {tolerance:.0e} is allowed)",
                batch_size=size,
                difference=worst,
                tolerance=tolerance,
            )
        largest = max(largest, worst)
    return largest


def difference(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to 1 + |wanted|. NaN equals NaN and nothing else."""
    if not wanted.numel():
        return 0.0
    mine, theirs = wanted.double(), given.to(wanted.device).double()
    apart = (mine - theirs).abs() / (1.0 + mine.abs())
    apart[(mine == theirs) | (mine.isnan() & theirs.isnan())] = 0.0
    return float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
