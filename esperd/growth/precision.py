"""Mixed precision: in what precision passes run, and how gradients are kept from vanishing in half precision.

Micikevicius et al. 2018 (arXiv:1710.03740). bfloat16 has float32's range and needs no scaling; float16 does.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

PrecisionName = Literal["float32", "bfloat16", "float16"]
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """How passes run and steps are taken.

    Args:
        name: ``float32``: as the model is; ``bfloat16``: autocast; ``float16``: autocast and a gradient scaler.
        device: where the model lives.
    """

    def __init__(self, name: PrecisionName = "float32", device: torch.device | None = None) -> None:
        self.name = name
        self._device_type = (device or torch.device("cpu")).type
        self.scaler = torch.amp.GradScaler(self._device_type) if name == "float16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Passes inside run in this precision."""
        dtype = AUTOCAST.get(self.name)
        return nullcontext() if dtype is None else torch.autocast(self._device_type, dtype=dtype)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to take gradients of."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def overflowed(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
        """For each parameter with a gradient, whether that is not finite while it is scaled: () bool, on the device. Empty
        without a scaler, where gradients show it themselves.
        """
        if self.scaler is None:
            return {}
        return {each: ~torch.isfinite(each.grad).all() for each in parameters if each.grad is not None}

    def unscale(self, optimizer: torch.optim.Optimizer, isolated: Iterable[nn.Parameter]) -> None:
        """Bring gradients back to their size before anything looks at them.

        Args:
            optimizer: about to step.
            isolated: parameters of seeds that learn behind the host. The scaler skips a whole step when one gradient
                overflowed, so theirs are made finite first: what a seed does behind the host must not cost the host a step.
        """
        if self.scaler is None:
            return
        for parameter in isolated:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step; in float16 none when a gradient overflowed."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> tuple[float, int] | None:
        """Scale and steps since it last changed; None without a scaler."""
        if self.scaler is None:
            return None
        held = self.scaler.state_dict()
        return float(held["scale"]), int(held["_growth_tracker"])

    def restore(self, state: tuple[float, int] | None) -> None:
        """Go on from a saved state; a scaler that has none starts anew."""
        if self.scaler is None or state is None:
            return
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": state[0], "_growth_tracker": state[1]})
