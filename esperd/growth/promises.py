"""What a pass through a blueprint's module promises to the network around it.

Some of the promises of :mod:`esperd.growth.contract`, which runs them: a pass leaves its input and the job's random streams
alone, computes each sample (and each token, from those before it) for itself, computes the same again, and has a portable form.
Looked at on a stirred module, because a zero-initialised last layer hides whatever stands before it. Each returns what it saw.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from esperd.declarations import OPEN_DIMENSIONS, Blueprint, Shape
from esperd.errors import BlueprintRejected
from esperd.execution.export import export_graph
from esperd.growth.streams import forked

SAMPLES = 5
TOKENS = 11
"""Fewest tokens of a sequence in which what a token hears is looked at, each place on its own."""
STIR = 0.1
"""Standard deviation of the noise on every parameter. Chosen, not measured."""
TOLERANCE = 1e-4
"""Largest difference taken for rounding, relative to the largest output. Chosen: a batch of another size runs other kernels,
whose sums differ by up to 3e-7 of it for what is built in (measured on a CPU, in single precision); a mean over samples or
tokens inside a stirred module moves it by 0.05 to 0.2."""


class Broken(Exception):
    """A promise is broken; the text is the detail of its check."""


def stirred(module: nn.Module) -> nn.Module:
    """A copy with noise on every parameter, as after some training."""
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=STIR)
    return copied


def input_kept(module: nn.Module, shape: Shape, batches: Sequence[int]) -> str:
    """A pass writes nothing to its input, in either mode.

    Raises:
        Broken: when a value of it changed, or torch counted an operation in place.
    """
    for training in (True, False):
        candidate = copy.deepcopy(module).train(training)
        for batch in batches:
            x = torch.randn(batch, *shape)
            host, version = x.clone(), x._version
            candidate(x)
            if torch.equal(x, host) and x._version == version:
                continue
            moved = int((x != host).sum()) if x.shape == host.shape else host.numel()
            raise Broken(
                f"in {_mode(training)} it writes to its input, which is the host's tensor: {moved} of {host.numel()} values"
                f" changed, {x._version - version} operations in place; use operations that return a new tensor, or x.clone()"
            )
    return f"untouched at batches {', '.join(map(str, batches))}"


def deterministic(module: nn.Module, shape: Shape) -> str:
    """Two passes are equal, in evaluation from two states of the random generator, in training from one.

    Raises:
        Broken: when they differ.
    """
    x = torch.randn(SAMPLES, *shape)
    with torch.random.fork_rng(devices=[]):
        evaluated = copy.deepcopy(module).eval()
        state = torch.get_rng_state()
        for training in (True, False):
            outputs = []
            for _ in range(2):
                if training:
                    torch.set_rng_state(state)  # dropout draws the same mask
                candidate = copy.deepcopy(module).train() if training else evaluated
                outputs.append(candidate(x).detach())
                torch.rand(1)  # so that the second pass in evaluation starts from another state
            first, second = outputs
            if not torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True):  # NaN is for another check to tell
                passes = "training passes from one RNG state" if training else "evaluation passes"
                raise Broken(
                    f"two {passes} differ by up to {float((first - second).abs().max()):g};"
                    " if that is meant, declare deterministic=False"
                )
    return "two passes are equal to the bit, in evaluation from two RNG states"


def streams(module: nn.Module, shape: Shape, *, may_draw_in_evaluation: bool) -> str:
    """A pass draws from torch's generator in training at most, never seeds it, and leaves Python's and numpy's alone.

    Seeding shows in where the generator stands afterwards: that must follow from where it stood before, and from nothing else.

    Args:
        module: any of the blueprint's.
        shape: of one sample.
        may_draw_in_evaluation: what a blueprint says by ``deterministic=False``.

    Raises:
        Broken: when a stream stands where it may not.
    """
    x = torch.randn(SAMPLES, *shape)
    seen: list[str] = []
    with forked(torch.device("cpu")):
        one = torch.get_rng_state()
        torch.rand(1)
        other = torch.get_rng_state()
        for training in (True, False):
            mode = _mode(training)
            after, again, elsewhere = [_stream_after(module, x, start, training=training) for start in (one, one, other)]
            draws = not (torch.equal(after, one) and torch.equal(again, one) and torch.equal(elsewhere, other))
            if draws and not training and not may_draw_in_evaluation:
                raise Broken(
                    "in evaluation it draws from torch's generator or seeds it; draw in training alone, as"
                    " functional.dropout(x, p, self.training) does, or declare deterministic=False"
                )
            if draws and torch.equal(after, elsewhere):
                raise Broken(
                    f"after passes in {mode} from two states of torch's generator it stands in one and the same: the pass seeds"
                    " it, and the host draws from it too; leave out torch.manual_seed"
                )
            if not torch.equal(after, again):
                raise Broken(
                    f"after two passes in {mode} from one state of torch's generator it stands in two: the pass seeds it by"
                    " chance, or draws more at one time than at another, and no run can be repeated; leave out torch.seed, draw"
                    " equally often"
                )
            seen.append(f"{mode} {'draws from' if draws else 'does not move'} torch's generator")
    return ", ".join(seen)


def _stream_after(module: nn.Module, x: Tensor, start: Tensor, *, training: bool) -> Tensor:
    """Where torch's generator stands after one pass from ``start``."""
    candidate = copy.deepcopy(module).train(training)
    torch.set_rng_state(start)
    before = _other_streams()
    candidate(x)
    if moved := [name for name, stream in _other_streams().items() if stream != before[name]]:
        raise Broken(
            f"in {_mode(training)} it draws from the global stream of {' and '.join(moved)} or seeds it, which the job's data may"
            " draw from; a pass may draw from torch's generator alone"
        )
    return torch.get_rng_state()


def _other_streams() -> dict[str, object]:
    """Where Python's and numpy's generators stand, to be compared."""
    numpys = np.random.get_state(legacy=False)
    assert isinstance(numpys, dict)  # noqa: S101 - what legacy=False means
    held = numpys["state"]
    place = (held["key"].tobytes(), held["pos"], numpys["has_gauss"], numpys["gauss"])
    return {"random": random.getstate(), "numpy.random": place}


def independent(module: nn.Module, shape: Shape) -> str:
    """In evaluation a sample alone gives what it gives within a batch.

    Raises:
        Broken: when an output differs by more than :data:`TOLERANCE` of the largest.
    """
    evaluated = copy.deepcopy(module).eval()
    x = torch.randn(SAMPLES, *shape)
    with torch.no_grad():
        together: Tensor = evaluated(x)
        alone = torch.cat([evaluated(x[sample : sample + 1]) for sample in range(SAMPLES)])
    apart = _apart(alone, together)
    if apart > TOLERANCE:
        raise Broken(
            f"in evaluation a sample alone and within a batch of {SAMPLES} differ by up to {apart:g} of the largest output"
            f" (taken for rounding: {TOLERANCE:g}): it computes over the batch; compute over the other dimensions, or with"
            " running statistics as BatchNorm does"
        )
    return f"a sample alone and within a batch of {SAMPLES}: {apart:g} of the largest output apart"


def causal(module: nn.Module, shape: Shape) -> str:
    """In evaluation no token hears a later one: with every token from some place on exchanged, those before it give the same.

    Raises:
        Broken: when an output differs by more than :data:`TOLERANCE` of the largest.
    """
    evaluated = copy.deepcopy(module).eval()
    length = max(shape[0], TOKENS)
    x, exchanged = torch.randn(2, 1, length, *shape[1:])
    furthest = 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        first: Tensor = evaluated(x)
        for place in range(1, length):
            torch.set_rng_state(state)  # what draws in evaluation draws the same
            later: Tensor = evaluated(torch.cat([x[:, :place], exchanged[:, place:]], dim=1))
            apart = _apart(later[:, :place], first[:, :place])
            if apart > TOLERANCE:
                raise Broken(
                    f"with other tokens from place {place} of {length} on, outputs before it move by up to {apart:g} of the"
                    f" largest (taken for rounding: {TOLERANCE:g}): a token hears later ones, which the network is to predict;"
                    " mask them (is_causal=True), pad a convolution on the left alone, compute no mean over tokens"
                )
            furthest = max(furthest, apart)
    return f"with other tokens from any of {length} places on, those before it move by {furthest:g} of the largest output"


def exports(blueprint: Blueprint, module: nn.Module, shape: Shape) -> str:
    """The module has a portable form, in which alone it is grown.

    Raises:
        Broken: with the reason of :func:`esperd.execution.export.export_graph`.
    """
    try:
        graph = export_graph(blueprint.name, module, torch.randn(2, *shape), OPEN_DIMENSIONS[blueprint.topology])
    except BlueprintRejected as error:
        raise Broken(f"{error}; it would be refused when a job wants to grow it") from error
    return f"{len(graph.ops)} operations"


def _apart(outputs: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest reference; what is not finite is for another check to tell."""
    difference = (outputs - reference).nan_to_num(0.0, 0.0, 0.0).abs().max()
    largest = reference.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float(difference / largest) if largest > 0 else float(difference)


def _mode(training: bool) -> str:  # noqa: FBT001 - a word for it
    return "training" if training else "evaluation"
