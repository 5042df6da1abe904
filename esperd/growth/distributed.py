"""Training passes over several processes: the host's own through torch's DistributedDataParallel, gradients averaged.

DistributedDataParallel sees the host and the seeds that are heard. A seed that is not, and learns by second passes or straight
through, has its gradients averaged by themselves: among the host's they would change how those travel, and with more than two
processes the last bits of their sums.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.ranks import Ranks
from esperd.growth.runner import Forward

HEARD = ("blended", "whole")
"""How a seed is present whose parameters the host's pass trains."""


class Heard(nn.Module):
    """The part of a network whose gradients come from the host's own pass.

    Args:
        network: is called; its seeds that are not heard are no part of this module.
        seeds: those that are heard.
    """

    def __init__(self, network: GrowingNetwork, seeds: list[Seed]) -> None:
        super().__init__()
        self.host = network.host
        self.seeds = nn.ModuleList(seeds)
        self._networks = (network,)  # in a tuple: as a submodule it would bring the others along

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the network predicts, (B, ...)."""
        prediction: torch.Tensor = self._networks[0](*inputs)
        return prediction


class Distributed:
    """Runs training passes on every rank and averages their gradients.

    The first pass brings every rank's weights to those of rank 0; BatchNorm's statistics follow rank 0 before each pass.

    Args:
        ranks: the processes.
        find_unused_parameters: the host has parameters that some passes do not use, see ``DistributedDataParallel``.
    """

    records = True

    def __init__(self, ranks: Ranks, *, find_unused_parameters: bool = False) -> None:
        self.ranks = ranks
        self.find_unused_parameters = find_unused_parameters
        self._network: GrowingNetwork | None = None
        self._heard: list[Seed] = []
        self._wrapped: DistributedDataParallel | None = None
        self._began = False

    def forward(self, network: GrowingNetwork, structure: str, *, counted: bool) -> Forward:  # noqa: ARG002 - as in Runner
        """The network, wrapped; wrapped anew when another set of seeds is heard."""
        heard = [seed for seed in network.seeds() if seed.presence in HEARD]
        if self._wrapped is None or network is not self._network or heard != self._heard:
            self._wrapped = None  # its hooks on the parameters go with it
            self._wrapped = DistributedDataParallel(
                Heard(network, heard), init_sync=not self._began, find_unused_parameters=self.find_unused_parameters
            )
            self._network, self._heard, self._began = network, heard, True
        return self._wrapped

    def taught(self, seed: Seed) -> None:
        """Average a seed's gradients over the ranks. A parameter without one counts as one whose gradient is zero."""
        parameters = [parameter for parameter in seed.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.average([parameter.grad for parameter in parameters if parameter.grad is not None])
