"""What people and the policy say to each other: a person's word for the next decision point, and decisions explained."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from esperd.messages.base import LARGEST_INTEGER, Message, Reply, Value
from esperd.messages.policy import Decide, Decided, Decision

Wish = Literal["grow", "keep", "cull", "wait", "approve"]
"""What a person may say: grow an arm, keep or cull a seed, grow nothing, or approve what the policy proposed."""

Point = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_INTEGER)]
MOST_REPLAYED = 100
"""Points that are recomputed in one answer at most, so that no job waits long for a decision; chosen, not measured."""


class Overrule(Message, frozen=True, kw_only=True):
    """A person's word for the next decision point of a job; durable before it is answered by :class:`Overruled`."""

    id: str
    """The job."""
    wish: Wish
    by: str
    """Who says so: the user's name, as the client tells it."""
    reason: str = ""
    slot: str = ""
    """For ``grow``."""
    blueprint: str = ""
    """For ``grow``."""
    seed: str = ""
    """For ``keep`` and ``cull``."""
    number: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """For ``approve``: which of the proposals, counted from 1; None: all."""


class Overruled(Reply, frozen=True, kw_only=True):
    """The word is kept, and is part of the next answer that this job gets."""

    decisions: tuple[Decision, ...]
    """What will be decided."""
    note: str = ""
    """What may stand in the way, as far as the last decision point knew; empty: nothing."""


class ListProposals(Message, frozen=True, kw_only=True):
    """What awaits a person's approval in a job; answered by :class:`ProposalList`."""

    id: str


class ProposalList(Reply, frozen=True, kw_only=True):
    """Proposals of the latest decision point, and what was said since."""

    point: int | None
    """The latest decision point; None before the first."""
    proposals: tuple[Decision, ...]
    """As they will be decided once approved."""
    said: tuple[Decision, ...]
    """What people said for the next decision point."""


class ExplainDecision(Message, frozen=True, kw_only=True):
    """One decision point as it was logged; answered by :class:`LoggedDecision`."""

    id: str
    point: Point


class LoggedDecision(Reply, frozen=True, kw_only=True):
    """A decision point."""

    point: int
    decided_at: float
    """Seconds since the epoch."""
    request: Decide | None
    """What was asked; None: logged by an older esperd, which did not keep it."""
    answer: Decided
    said: tuple[Decision, ...]
    """What people had said for this point."""


class ReplayDecisions(Message, frozen=True, kw_only=True):
    """Compute the answers of a job's decision points again, after ``after``; answered by :class:`ReplayPage`."""

    id: str
    after: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_REPLAYED)] = 20


class ReplayedPoint(Value, frozen=True, kw_only=True):
    """What came of computing one answer again."""

    point: int
    same: bool | None
    """Whether decisions and state are the same, byte for byte; None: the request was not kept, nothing was computed."""
    difference: str = ""
    """What differs; empty when nothing does."""


class ReplayPage(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ReplayDecisions`; ask again after the last point while ``more``."""

    points: tuple[ReplayedPoint, ...]
    more: bool
