"""The strategy ``never``: grows nothing, so that a job can be compared with itself."""

from __future__ import annotations

from esperd.messages.policy import Decide, Decided, Decision


def decide(request: Decide) -> Decided:
    """Wait, always; the state is handed back as it came."""
    return Decided(decisions=(Decision(action="wait", reason="the strategy never grows anything"),), state=request.state)
