"""Compiles one blueprint for one shape: build, count, export, compare with the eager module, measure, describe."""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import safetensors.torch
import torch
from torch import Tensor, nn

from esperd.declarations import OPEN_DIMENSIONS, Blueprint, resolve
from esperd.errors import BlueprintRejected, EsperError, KernelRejected
from esperd.execution.export import export_graph
from esperd.execution.graph import FLOATING
from esperd.execution.oplist import TORCH_DTYPES, KernelModule, load_kernel
from esperd.growth.flops import count_flops
from esperd.messages.kernels import KernelCompiled, KernelKey, KernelManifest, Profile, SelfTest

RNG_SEED = 0
"""Weights and inputs of the self-test are drawn from it, so that compiling twice gives the same manifest but for the profile."""

SELF_TEST_BATCHES = (1, 2, 3, 8)
SELF_TEST_SHORT_BATCHES = (1, 2)
"""Batches at lengths of a sequence other than the shape's own."""
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-4}
"""Largest absolute difference from the eager module. On a CPU none is expected: both call the same functions."""

PROFILE_BATCH = 32
PROFILE_REPEATS = 15
PROFILE_WARMUP = 3


def compile_kernel(key: KernelKey, blueprint: Blueprint, clock: Callable[[], float] = time.perf_counter) -> KernelCompiled:
    """Compile, validate and profile a kernel.

    Args:
        key: what to compile for.
        blueprint: the declaration that ``key`` names.
        clock: seconds, rising.

    Raises:
        BlueprintRejected: when the module does not build, has no portable form, differs from it by more than the tolerance, or
            a formula does not equal the true count; carries both numbers.
        ImportFailed: when the factory cannot be imported.
        KernelRejected: when dtype or device cannot be compiled for here.
    """
    started = clock()
    dtype, device = _target(key)
    with _seeded(device):
        module = build(blueprint, key.shape).to(device, dtype)
        example = torch.randn(2, *key.shape, device=device, dtype=dtype)
        parameters, flops = check_formulas(blueprint, key.shape, module, example)
        open_dimensions = OPEN_DIMENSIONS[blueprint.topology]
        graph = export_graph(blueprint.name, module, example, open_dimensions).encode()
        weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
        kernel = load_kernel(graph, weights).to(device)
        lengths = self_test_lengths(key.shape[0]) if 1 in open_dimensions else ()
        error = self_test(blueprint.name, module, kernel, key, lengths)
        profile = _profile(kernel, key, clock)
    manifest = KernelManifest(
        key=key,
        graph_sha256=_sha256(graph),
        weights_sha256=_sha256(weights),
        parameters=parameters,
        flops_per_sample=flops,
        torch=str(torch.__version__),
        self_test=SelfTest(batches=SELF_TEST_BATCHES, lengths=lengths, max_abs_error=error),
        profile=profile,
    )
    return KernelCompiled(manifest=manifest, graph=graph, weights=weights, seconds=clock() - started)


def build(blueprint: Blueprint, shape: tuple[int, ...]) -> nn.Module:
    """Build a blueprint's module for a shape.

    Raises:
        BlueprintRejected: when its factory raises or returns something that is not a module.
        ImportFailed: when the factory cannot be imported.
    """
    factory = resolve(blueprint.factory)
    try:
        module = factory(shape)
    except (Exception, SystemExit) as error:
        raise BlueprintRejected(
            f"blueprint {blueprint.name!r} does not build for shape {shape}: {type(error).__name__}: {error}",
            blueprint=blueprint.name,
        ) from error
    if not isinstance(module, nn.Module):
        raise BlueprintRejected(
            f"the factory of blueprint {blueprint.name!r} returned {type(module).__name__}, not a torch.nn.Module",
            blueprint=blueprint.name,
        )
    return module


def check_formulas(blueprint: Blueprint, shape: tuple[int, ...], module: nn.Module, example: Tensor) -> tuple[int, float]:
    """Hold a blueprint's formulas against the true counts.

    Args:
        blueprint: the declaration.
        shape: of one sample.
        module: what its factory built.
        example: (B, ...) an input.

    Returns:
        True number of parameters and true forward FLOPs of one sample.

    Raises:
        BlueprintRejected: when a formula differs from the count, with both numbers; or when the module fails on the input,
            does not keep its shape or has no parameters.
    """
    name = blueprint.name
    parameters = sum(parameter.numel() for parameter in module.parameters())
    try:
        with torch.no_grad():
            # in evaluation, so that counting leaves running statistics as they were
            output, flops = count_flops(lambda: copy.deepcopy(module).eval()(example))
        claimed_parameters, claimed_flops = blueprint.parameters(shape), blueprint.flops(shape)
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        raise BlueprintRejected(
            f"blueprint {name!r} fails for shape {shape}: {type(error).__name__}: {error}", blueprint=name
        ) from error
    if not isinstance(output, Tensor) or output.shape != example.shape or output.dtype != example.dtype:
        returned = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise BlueprintRejected(
            f"blueprint {name!r} must keep shape and dtype {tuple(example.shape)} {example.dtype}, it returned {returned}",
            blueprint=name,
        )
    flops_per_sample = flops / len(example)
    if parameters == 0:
        raise BlueprintRejected(
            f"blueprint {name!r} has no parameters for shape {shape}, so there is nothing to train", blueprint=name
        )
    if claimed_parameters != parameters:
        raise BlueprintRejected(
            f"the parameter formula of blueprint {name!r} says {claimed_parameters} for shape {shape}, it has {parameters}",
            blueprint=name,
            claimed=claimed_parameters,
            counted=parameters,
        )
    if claimed_flops != flops_per_sample:
        raise BlueprintRejected(
            f"the FLOP formula of blueprint {name!r} says {claimed_flops:g} for shape {shape}, it takes {flops_per_sample:g}",
            blueprint=name,
            claimed=claimed_flops,
            counted=flops_per_sample,
        )
    return parameters, flops_per_sample


def self_test_lengths(length: int) -> tuple[int, ...]:
    """Lengths of a sequence to try besides the one compiled for: one token, two, about half as many, some more."""
    return tuple(sorted({1, 2, (length + 1) // 2, length + 3} - {length}))


def self_test(name: str, module: nn.Module, kernel: KernelModule, key: KernelKey, lengths: Sequence[int] = ()) -> float:
    """Compare a kernel with the eager module: outputs, input and parameter gradients, buffers, in both modes.

    It runs once with the weights as they are and once with noise added: at birth a zero-initialised last layer hides
    everything before it.

    Args:
        name: the blueprint's, for messages.
        module: the eager module; copies of it are run.
        kernel: a kernel with the same weights; copies of it are run.
        key: shape, dtype and device of the inputs.
        lengths: sizes of the shape's first dimension to try besides its own.

    Returns:
        Largest absolute difference.

    Raises:
        BlueprintRejected: when it is above the tolerance, the module computes something else each time or something that is
            not a number, or one of the two fails to run.
    """
    noisy = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    shapes = [(batch, *key.shape) for batch in SELF_TEST_BATCHES]
    shapes += [(batch, length, *key.shape[1:]) for length in lengths for batch in SELF_TEST_SHORT_BATCHES]
    worst = 0.0
    for weights in (module.state_dict(), noisy.state_dict()):
        for training in (True, False):
            for shape in shapes:
                worst = max(worst, _compare(name, module, kernel, weights, shape, key, training=training))
    return worst


def _compare(
    name: str,
    module: nn.Module,
    kernel: nn.Module,
    weights: dict[str, Tensor],
    shape: tuple[int, ...],
    key: KernelKey,
    *,
    training: bool,
) -> float:
    """Difference between module and kernel for one input.

    Raises:
        BlueprintRejected: as :func:`self_test`.
    """
    length = f", length {shape[1]}" if shape[1:] != key.shape else ""
    place = f"batch {shape[0]}{length}, {'training' if training else 'evaluating'}"
    x = torch.randn(shape, device=key.device, dtype=TORCH_DTYPES[key.dtype])
    try:
        difference = _difference((module, kernel), weights, x, training=training)
        itself = difference
        if not difference <= TOLERANCE[key.device]:  # also when it is not a number
            itself = _difference((module, module), weights, x, training=training)
    except (Exception, SystemExit) as error:
        raise BlueprintRejected(
            f"blueprint {name!r} fails its self-test at {place}: {type(error).__name__}: {error}", blueprint=name
        ) from error
    if difference <= TOLERANCE[key.device]:
        return difference
    if math.isnan(itself):
        problem = f"blueprint {name!r} computes something that is not a finite number at {place}"
    elif itself > TOLERANCE[key.device]:
        problem = (
            f"blueprint {name!r} is not deterministic: at {place} its module differs from itself by {itself:g} in two passes"
            " from one state of the random generator"
        )
    else:
        problem = (
            f"the kernel of blueprint {name!r} differs from its module by {difference:g} at {place};"
            f" at most {TOLERANCE[key.device]:g} is allowed"
        )
    raise BlueprintRejected(problem, blueprint=name, difference=difference)


def _difference(candidates: tuple[nn.Module, nn.Module], weights: dict[str, Tensor], x: Tensor, *, training: bool) -> float:
    """Largest absolute difference between what two modules with the same weights make of one input."""
    cotangent = torch.randn_like(x)
    rng_seed = int(torch.randint(2**31, ()).item())
    first, second = (_outcome(candidate, weights, x, cotangent, rng_seed, training=training) for candidate in candidates)
    if first.keys() != second.keys():
        differing = ", ".join(sorted(first.keys() ^ second.keys()))
        raise KernelRejected(f"only one of module and kernel yields {differing}")
    errors = [(first[name].double() - second[name].double()).abs() for name in first if first[name].numel()]
    return float(torch.stack([error.max() for error in errors]).max())


def _outcome(
    candidate: nn.Module, weights: dict[str, Tensor], x: Tensor, cotangent: Tensor, rng_seed: int, *, training: bool
) -> dict[str, Tensor]:
    """Everything a forward and backward pass leaves behind, by name."""
    candidate = copy.deepcopy(candidate).train(training)
    candidate.load_state_dict(weights)
    x = x.clone().requires_grad_()
    torch.manual_seed(rng_seed)  # dropout draws the same mask in both
    output = candidate(x)
    output.backward(cotangent)
    gradients = {"input gradient": x.grad} | {
        f"gradient of {name}": parameter.grad for name, parameter in candidate.named_parameters()
    }
    return (
        {"output": output.detach()}
        | {name: gradient for name, gradient in gradients.items() if gradient is not None}
        | {f"buffer {name}": buffer for name, buffer in candidate.named_buffers()}
    )


def _profile(kernel: KernelModule, key: KernelKey, clock: Callable[[], float]) -> Profile:
    kernel = copy.deepcopy(kernel).train()
    x = torch.randn(PROFILE_BATCH, *key.shape, device=key.device, dtype=TORCH_DTYPES[key.dtype], requires_grad=True)
    cotangent = torch.randn_like(x)
    forwards: list[float] = []
    backwards: list[float] = []
    for _ in range(PROFILE_WARMUP + PROFILE_REPEATS):
        before = _now(key, clock)
        output = kernel(x)
        between = _now(key, clock)
        output.backward(cotangent)
        forwards.append(between - before)
        backwards.append(_now(key, clock) - between)
    return Profile(
        batch=PROFILE_BATCH,
        forward_us=statistics.median(forwards[PROFILE_WARMUP:]) * 1e6,
        backward_us=statistics.median(backwards[PROFILE_WARMUP:]) * 1e6,
    )


def _now(key: KernelKey, clock: Callable[[], float]) -> float:
    if key.device == "cuda":
        torch.cuda.synchronize()
    return clock()


def _target(key: KernelKey) -> tuple[torch.dtype, torch.device]:
    if key.dtype not in FLOATING:
        raise KernelRejected(f"kernels are compiled for {', '.join(FLOATING)}, not for {key.dtype!r}", dtype=key.dtype)
    if key.device not in TOLERANCE:
        raise KernelRejected(f"kernels are compiled for {', '.join(TOLERANCE)}, not for {key.device!r}", device=key.device)
    if key.device == "cuda" and not torch.cuda.is_available():
        raise KernelRejected("this machine has no CUDA device to test a kernel on", device=key.device)
    return TORCH_DTYPES[key.dtype], torch.device(key.device)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Draw from :data:`RNG_SEED` inside, and leave the process's generators as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(RNG_SEED)
        yield


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
