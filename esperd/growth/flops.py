"""FLOPs as they are executed: counted once for each structure on the real model, then multiplied by samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.flop_counter import FlopCounterMode

ResultT = TypeVar("ResultT")


def count_flops(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """Run ``work`` and count what it executes: convolutions and matrix products, forward and backward.

    A multiply-add counts as two. The numbers computed are those of an uncounted run: counting observes operations, it does
    not replace them.

    Returns:
        What ``work`` returned, and the FLOPs of its convolutions, matrix products and attention.
    """
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, float(counter.get_total_flops())
