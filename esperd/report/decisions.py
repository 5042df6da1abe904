"""Decisions in words: the policy's and the governor's."""

from __future__ import annotations

import msgspec

from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.policy import Decision
from esperd.messages.telemetry import RolledBack


def say_decision(decision: Decision) -> str:
    """What was decided, without the reason: ``germinate conv at features.3``, ``cull features.3#1``."""
    if decision.proposes:
        return f"propose to {say_decision(msgspec.structs.replace(decision, action=decision.proposes, proposes=''))}"
    if decision.action == "wait" and decision.arm is not None:
        return f"decline {decision.arm.blueprint} at {decision.arm.slot}"
    if decision.arm is not None:
        return f"{decision.action} {decision.arm.blueprint} at {decision.arm.slot}"
    if decision.alpha is not None:
        return f"{decision.action} {decision.seed} to {decision.alpha:g}"
    return f"{decision.action} {decision.seed}" if decision.seed else decision.action


def say_evidence(given: EvidenceSnapshot) -> str:
    """What the policy was given of other jobs' experience."""
    return f"{given.tries} tries of {given.jobs} other jobs, as {given.precedents} precedents (sha256 {given.sha256[:12]})"


def say_remedy(action: str, rate_scale: float) -> str:
    """What the governor did differently after a rollback: ``the living seeds were culled``."""
    return "the living seeds were culled" if action == "cull" else f"learning rate cut to {rate_scale:.3g} of its schedule"


def say_rollback(body: RolledBack) -> str:
    """What went wrong, how far training went back, and what is done differently from there."""
    return f"{body.reason}; back from epoch {body.epoch} to {body.to_epoch}, {say_remedy(body.action, body.rate_scale)}"
