"""The triggers ``always``, ``never`` and ``periodic``: they look at nothing but the epoch."""

from __future__ import annotations

from esperd.messages.policy import Decide, Signal


def always(request: Decide) -> Signal:  # noqa: ARG001 - as every trigger
    """Fire."""
    return Signal(fires=True, reason="every decision point is a time to grow")


def never(request: Decide) -> Signal:  # noqa: ARG001 - as every trigger
    """Do not fire."""
    return Signal(fires=False, reason="the trigger never fires")


def periodic(request: Decide) -> Signal:
    """Fire at the end of the warm-up and every ``period`` epochs from then on (AutoGrow's periodic growth: Wen, Yan, Chen and Li
    2020, arXiv:1906.02909). Whether something was grown at that time does not matter.
    """
    epoch, settings = request.observation.epoch, request.settings
    since, every = (epoch - settings.warmup_epochs) % settings.period, f"every {settings.period} (period)"
    if since == 0:
        return Signal(fires=True, reason=f"epoch {epoch} is a time to grow: {every}")
    return Signal(fires=False, reason=f"epoch {epoch}: the next time is epoch {epoch + settings.period - since}, {every}")
