"""Folds seeds into the layers around them where algebra allows: an affine seed beside a linear layer is a linear layer.

A seed is folded when its op list is affine (only matrix products, sums and products with constants) and a linear layer either
makes its slot's tensor or is the only one to look at it. Every fold is then tried on the whole network: outputs must agree
within 1e-5, or it is undone. Anything with a normalisation or a nonlinearity stays a seed, and the result says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from esperd.errors import ExportRejected
from esperd.growth.export import STRUCTURE, WEIGHTS, encode, load, read
from esperd.growth.network import GrowingNetwork, Seed

TOLERANCE = 1e-5
"""Largest difference a fold may make to an output, relative to 1 + |output|."""

AFFINE_OPERATIONS = frozenset({"aten.linear.default", "aten.add.Tensor", "aten.mul.Scalar"})
"""Operations of an op list that keep it affine in its input: none of them multiplies two values that depend on it."""

SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What a merge did."""

    folded: tuple[str, ...]
    kept: dict[str, str]
    """Seeds that stayed, with the reason."""


def merge(network: GrowingNetwork, sample: torch.Tensor) -> Merge:
    """Fold every seed that can be folded, in place.

    Args:
        network: in eval mode.
        sample: (B, ...) inputs on which every fold is checked.

    Returns:
        Which seeds were folded, and why the others were not.
    """
    folded: list[str] = []
    kept: dict[str, str] = {}
    remaining = [seed.name for seed in network.seeds()]
    progress = True
    while progress:
        progress = False
        for name in list(remaining):
            why_not = _fold(network, network.seed(name), sample)
            if why_not:
                kept[name] = why_not
                continue
            remaining.remove(name)
            folded.append(name)
            kept.pop(name, None)
            progress = True
    return Merge(folded=tuple(folded), kept=kept)


def _fold(network: GrowingNetwork, seed: Seed, sample: torch.Tensor) -> str:
    """Fold one seed; returns why not, leaving the network as it was."""
    if seed.graph is None:
        return "it runs as a plain module, whose algebra is not known"
    if seed.operator_name != "add":
        return f"its operator ({seed.operator_name}) multiplies what flows by"
    curved = sorted({step[1] for step in msgspec.json.decode(seed.graph)["ops"]} - AFFINE_OPERATIONS)
    if curved:
        return f"it is not affine ({', '.join(curved)})"
    at_slot = list(network.port(seed.record.slot))
    before = network.host.get_submodule(seed.record.slot)
    after = _reader(network, seed.record.slot, sample)
    attempts: list[tuple[nn.Linear, Callable[[nn.Linear, Seed], str]]] = []
    if isinstance(before, nn.Linear) and at_slot[0] is seed:
        attempts.append((before, _fold_into_maker))
    if after is not None and at_slot[-1] is seed:
        attempts.append((after, _fold_into_reader))
    if not attempts:
        return f"no linear layer makes or reads the output of {seed.record.slot} beside it"
    problems = [_attempt(network, seed, layer, change, sample) for layer, change in attempts]
    return "" if "" in problems else "; ".join(problems)


def _attempt(
    network: GrowingNetwork, seed: Seed, layer: nn.Linear, change: Callable[[nn.Linear, Seed], str], sample: torch.Tensor
) -> str:
    if seed.name not in {other.name for other in network.seeds()}:
        return ""
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        wanted = network(sample)
        problem = change(layer, seed)
        if problem:
            return problem
        with network.alphas({seed.name: 0.0}):
            error = float(((network(sample) - wanted).abs() / (1 + wanted.abs())).max())
    if error <= TOLERANCE:
        network.remove(seed.name)
        return ""
    layer.load_state_dict(state)
    return f"folding it would change outputs by {error:.1e}"


def _affine(seed: Seed, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the slot as M·h + a: with s(h) = A·h + c and alpha α, M = I + α·(A - I) (F, F) and a = α·c (F,)."""
    constant = seed(torch.zeros(1, width, dtype=dtype))[0].double()
    matrix = (seed(torch.eye(width, dtype=dtype)).double() - constant).T
    identity = torch.eye(width, dtype=torch.float64)
    return identity + seed.alpha * (matrix - identity), seed.alpha * constant


def _fold_into_maker(layer: nn.Linear, seed: Seed) -> str:
    """H = W·x + b becomes (M·W)·x + (M·b + a)."""
    mixing, constant = _affine(seed, layer.out_features, layer.weight.dtype)
    bias = _bias(layer)
    if bias is None and bool((constant != 0).any()):
        return "the layer before it has no bias to take its constant"
    layer.weight.copy_(mixing @ layer.weight.double())
    if bias is not None:
        bias.copy_(mixing @ bias.double() + constant)
    return ""


def _fold_into_reader(layer: nn.Linear, seed: Seed) -> str:
    """Y = V·z + d with z = M·h + a becomes (V·M)·h + (V·a + d)."""
    mixing, constant = _affine(seed, layer.in_features, layer.weight.dtype)
    bias = _bias(layer)
    if bias is None and bool((constant != 0).any()):
        return "the layer behind it has no bias to take its constant"
    if bias is not None:
        bias.copy_(layer.weight.double() @ constant + bias.double())
    layer.weight.copy_(layer.weight.double() @ mixing)
    return ""


def _bias(layer: nn.Linear) -> nn.Parameter | None:
    """The layer's bias; torch annotates it as if there always were one."""
    bias: nn.Parameter | None = dict(layer.named_parameters()).get("bias")
    return bias


class _Readers(TorchFunctionMode):
    """Notes every call that is handed one tensor, views and comparisons included; looking at its metadata does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor: torch.Tensor | None = None
        self.calls: list[Any] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the call returns
        handed = [*args, *(kwargs or {}).values()]
        handed += [item for part in handed if isinstance(part, (list, tuple)) for item in part]
        reads = getattr(func, "__name__", "") != "__get__"
        if reads and self.tensor is not None and any(part is self.tensor for part in handed):
            self.calls.append(func)
        return func(*args, **(kwargs or {}))


def _reader(network: GrowingNetwork, slot: str, sample: torch.Tensor) -> nn.Linear | None:
    """The linear layer that is handed the slot's very tensor, when nothing else in the host looks at it."""
    readers: list[nn.Linear] = []
    watch = _Readers()

    def note_output(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        watch.tensor = output

    def note_input(module: nn.Module, inputs: tuple[object, ...]) -> None:
        if isinstance(module, nn.Linear) and watch.tensor is not None and inputs and inputs[0] is watch.tensor:
            readers.append(module)

    handles = [network.host.get_submodule(slot).register_forward_hook(note_output)]
    handles += [module.register_forward_pre_hook(note_input) for module in network.host.modules()]
    try:
        with torch.no_grad(), watch:
            network(sample)
    finally:
        for handle in handles:
            handle.remove()
    return readers[0] if len(readers) == 1 and watch.calls == [nn.functional.linear] else None


def merge_export(
    directory: Path, *, host: nn.Module | Callable[..., nn.Module] | None = None, import_host: bool = False
) -> Merge:
    """Rewrite an export in place with every affine seed folded into a layer beside it.

    Args:
        directory: holds ``model.safetensors`` and ``growth.json``.
        host: as in :func:`esperd.growth.export.load`.
        import_host: as in :func:`esperd.growth.export.load`.

    Returns:
        What was folded and what was kept.

    Raises:
        ExportRejected: as in :func:`esperd.growth.export.load`, or the network takes no floating-point input.
    """
    structure, _ = read(directory)
    network = load(directory, host=host, import_host=import_host)
    dtype: object = getattr(torch, structure.input.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ExportRejected(f"folds are checked on random inputs, and this network takes {structure.input.dtype}")
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(SAMPLES, *structure.input.shape, generator=generator, dtype=dtype)
    result = merge(network, sample)
    weights, text = encode(
        network,
        host=structure.host,
        sample=structure.input,
        history=structure.history,
        manifest={**structure.manifest, "merged": list(result.folded)},
        version=structure.esperd,
    )
    # Both are on the disk before either takes the place of the old one; a pair that was torn apart is noticed by its hash.
    written = [(directory / f".{name}.merging", directory / name, data) for name, data in ((WEIGHTS, weights), (STRUCTURE, text))]
    for temporary, _, data in written:
        temporary.write_bytes(data)
    for temporary, final, _ in written:
        temporary.replace(final)
    return result
