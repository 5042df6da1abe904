"""Gradient merit: how fast the loss would fall if only this seed learned, as far as its first gradient tells.

The squared norm of the gradient of the seed's parameters is the rate at which gradient flow on them lowers the loss. Growing
where the norm is largest: Evci et al. 2022 (GradMax, arXiv:2201.05125) for new neurons, Kilcher et al. 2018 and SensLI (2023) for
new layers. It costs a few passes an arm and sees nothing of what lies beyond the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from esperd.growth.candidate import NotGrown, charge_fork, with_newborn
from esperd.growth.grower import Grower
from esperd.growth.incubation import SecondPass, lookahead_gradients
from esperd.growth.network import Seed
from esperd.growth.streams import Streams, device_of, forked
from esperd.messages.policy import Arm

Batch = tuple[torch.Tensor, torch.Tensor]


def gradient_merit(grower: Grower, arm: Arm, train: Callable[[], Iterator[Batch]], *, batches: int) -> float:
    """L2 norm of the mean gradient that a newborn seed of this arm receives at its target alpha.

    Args:
        grower: between two steps, in training mode. It does not move; its ledger is charged.
        arm: slot and blueprint.
        train: batches of the train split, without end, the same ones at each call; of several ranks each has its own.
        batches: over how many the gradient is averaged.

    Returns:
        The norm, in units of loss per unit of parameter.

    Raises:
        NotGrown: the arm cannot be grown at all, or its passes raise.
        InvalidModel: the network cannot be copied.
        ValueError: ``batches`` is not positive.
    """
    if batches < 1:
        raise ValueError(f"a gradient merit is taken over at least one batch, not {batches}")
    start = Streams.take(device_of(grower.network))
    twin, seed = with_newborn(grower, arm)
    parameters = list(seed.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    try:
        with forked(start.device, start):
            for inputs, targets in itertools.islice(train(), batches):
                for total, gradient in zip(sums, _gradients(twin, seed, inputs, targets), strict=True):
                    if gradient is not None:
                        total += gradient
    finally:  # a pass may raise after others that did not
        charge_fork(grower, twin)
    twin.ranks.average(sums)
    norm = torch.stack([total.double().norm() for total in sums]).norm() / batches
    return float(twin.ranks.first(f"the merit of {arm.blueprint} at {arm.slot}", float(norm)))


def _gradients(twin: Grower, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def work() -> SecondPass:
        return lookahead_gradients(twin.network, seed, inputs, targets, twin.loss, alpha=seed.alpha_target)

    structure, shape = f"merit:{seed.name}:{seed.blueprint}", tuple(inputs.shape[1:])
    try:
        return twin.ledger.charge("incubation", structure, len(inputs), work, shape=shape).gradients
    except Exception as error:  # a plugin's module may raise anything; the arm is at fault, and nothing but a fork has moved
        raise NotGrown(f"its pass raised {type(error).__name__}: {error}") from error
