"""The deciding actor: an observation in, decisions with their reasons out, each logged before it is answered."""

from __future__ import annotations

import math
import traceback

import anyio
import anyio.to_thread
import msgspec
import structlog

from esperd.actors.actor import Actor, handles
from esperd.declarations import resolve
from esperd.errors import EsperError, HandlerFailed, NothingToShow
from esperd.messages.base import Done
from esperd.messages.evidence import EvidenceForgotten, EvidenceList, ForgetEvidence, ListEvidence
from esperd.messages.overruling import (
    ExplainDecision,
    ListProposals,
    LoggedDecision,
    Overrule,
    Overruled,
    ProposalList,
    ReplayDecisions,
    ReplayedPoint,
    ReplayPage,
)
from esperd.messages.policy import Conclude, Decide, Decided, Decision
from esperd.plugins import Plugins
from esperd.policy.decision_log import DecisionLog, Logged
from esperd.policy.evidence import EvidenceStore
from esperd.policy.evidence_rows import rows_of
from esperd.policy.overruling import overrule, proposals, withhold
from esperd.policy.replay import difference
from esperd.policy.said import Said
from esperd.policy.trigger import checked, with_signal
from esperd.policy.wishes import decisions_of
from esperd.store.database import Database

log = structlog.get_logger(__name__)

REPLAYED_FOR_S = 3.0
"""After which a page of replayed points ends: a client waits 10 s for an answer. Chosen, not measured."""


class PolicyActor(Actor):
    """Answers :class:`~esperd.messages.policy.Decide`. Keeps nothing in memory: whichever incarnation is asked, the answer is
    the same.

    Args:
        database: opened with :data:`esperd.policy.decision_log.MIGRATIONS`.
        plugins: registered strategies and triggers.
    """

    def __init__(self, database: Database, plugins: Plugins) -> None:
        self._log = DecisionLog(database)
        self._said = Said(database)
        self._evidence = EvidenceStore(database)
        self._plugins = plugins

    @handles(Decide)
    async def decide(self, request: Decide) -> Decided:
        """Answer as this point was answered before; otherwise decide, log, answer. Tries that ended are recorded with it.

        A resumed job replays what it was told even when it now observes something else: growth that happened once happens
        again at the same point.

        Raises:
            UnknownName: when no strategy, or no trigger, has the name in the settings.
            ImportFailed: when the code of either does not import.
            HandlerFailed: when either raises, or answers with something other than ``Decided``, or ``Signal``, and nobody has
                said what to do at this point.
            StoreFailed: when the log cannot be read or written; then nothing was decided.
        """
        known = await self._log.find(request.job, request.point)
        if known is not None:
            return known
        if request.settings.memory:
            evidence, given = await self._evidence.snapshot(request.job)
            request = msgspec.structs.replace(request, evidence=evidence, given=given)
        answer = await self._answer(request, spoken=bool(await self._said.waiting(request.job)))
        return await self._log.append(request, answer, beside=self._evidence.record)

    @handles(Overrule)
    async def overrule(self, wish: Overrule) -> Overruled:
        """Keep a person's word for the next decision point of a job.

        Raises:
            UnknownName: when the last decision point knew no such slot, blueprint or seed.
            IllegalTransition: when the seed does not live any more, or no decision point is left.
            NothingToShow: when nothing awaits approval, or no proposal has this number.
            StoreFailed: when the log cannot be read or written; then nothing was said.
        """
        last = await self._log.latest(wish.id)
        seen = None if last is None or last.request is None else last.request.observation
        overruled = decisions_of(wish, seen, None if last is None else last.answer)
        await self._said.keep(wish.id, overruled.decisions)
        return overruled

    @handles(ListProposals)
    async def list_proposals(self, message: ListProposals) -> ProposalList:
        """What awaits approval, and what was said for the next decision point.

        Raises:
            StoreFailed: when the log cannot be read.
        """
        last = await self._log.latest(message.id)
        said = await self._said.waiting(message.id)
        return ProposalList(
            point=None if last is None else last.point,
            proposals=() if last is None else proposals(last.answer),
            said=tuple(word for words in said for word in words),
        )

    @handles(ExplainDecision)
    async def explain(self, message: ExplainDecision) -> LoggedDecision:
        """One decision point as it was logged.

        Raises:
            NothingToShow: when the job had no such decision point.
            StoreFailed: when the log cannot be read.
        """
        found = await self._log.page(message.id, message.point - 1, 1)
        if not found or found[0].point != message.point:
            last = await self._log.latest(message.id)
            raise NothingToShow(
                f"job {message.id} has no decision point {message.point}; "
                + ("none was logged yet" if last is None else f"the latest is {last.point}"),
                job=message.id,
                point=message.point,
            )
        said = await self._said.taken(message.id, message.point)
        return LoggedDecision(
            point=found[0].point,
            decided_at=found[0].decided_at,
            request=found[0].request,
            answer=found[0].answer,
            said=tuple(word for words in said for word in words),
        )

    @handles(ReplayDecisions)
    async def replay(self, message: ReplayDecisions) -> ReplayPage:
        """Compute answers again from the logged requests, and compare.

        Raises:
            StoreFailed: when the log cannot be read.
        """
        found = await self._log.page(message.id, message.after, message.limit + 1)
        points: list[ReplayedPoint] = []
        until = anyio.current_time() + REPLAYED_FOR_S
        for logged in found[: message.limit]:
            points.append(await self._replayed(message.id, logged))
            if anyio.current_time() > until:  # a slow strategy: who asked waits no longer, and asks for the rest
                break
        return ReplayPage(points=tuple(points), more=len(found) > len(points))

    async def _replayed(self, job: str, logged: Logged) -> ReplayedPoint:
        if logged.request is None:
            return ReplayedPoint(point=logged.point, same=None, difference="logged by an older esperd, without its request")
        try:
            said = await self._said.taken(job, logged.point)
            again = overrule(await self._answer(logged.request, spoken=bool(said)), said)
        except EsperError as error:
            return ReplayedPoint(point=logged.point, same=False, difference=f"{error.code}: {error}")
        found = difference(logged.answer, again)
        return ReplayedPoint(point=logged.point, same=not found, difference=found)

    async def _answer(self, request: Decide, *, spoken: bool) -> Decided:
        """What the strategy decides, or proposes where people approve; where it fails and people spoke, their word alone."""
        try:
            answer = await self._run_strategy(request)
        except EsperError as error:  # of the strategy or its trigger, or of their code
            log.warning("nothing was decided", error=str(error), **{**error.fields, "job": request.job, "point": request.point})
            if not spoken:
                raise
            waits = Decision(action="wait", reason=f"nothing but what people said: {error}")
            return Decided(decisions=(waits,), state=request.state, evidence=request.given)
        return withhold(answer) if request.settings.approve else answer

    @handles(Conclude)
    async def conclude(self, request: Conclude) -> Done:
        """Record how the last seeds of a job ended.

        Raises:
            StoreFailed: when it cannot be recorded.
        """
        await self._evidence.conclude(request)
        return Done()

    @handles(ListEvidence)
    async def list_evidence(self, request: ListEvidence) -> EvidenceList:
        """What tries of earlier jobs come to.

        Raises:
            StoreFailed: when they cannot be read.
        """
        return EvidenceList(rows=rows_of(await self._evidence.tries(request.blueprint, request.job)))

    @handles(ForgetEvidence)
    async def forget_evidence(self, request: ForgetEvidence) -> EvidenceForgotten:
        """Delete tries of earlier jobs.

        Raises:
            StoreFailed: when they cannot be deleted.
        """
        return EvidenceForgotten(tries=await self._evidence.forget(request.blueprint))

    async def _run_strategy(self, request: Decide) -> Decided:
        """Decide on a thread, so that a slow strategy delays no other actor; its trigger is asked first."""
        name = request.settings.strategy
        strategy = self._plugins.strategies[name]
        request = await self._ask_trigger(request)
        try:
            # Pure by contract: abandoned when this actor is stopped, it leaves nothing behind.
            answer = await anyio.to_thread.run_sync(_call, strategy.decide, request, abandon_on_cancel=True)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:
            raise HandlerFailed(
                f"strategy {name!r} raised {type(error).__name__} at point {request.point}: {error}",
                strategy=name,
                point=request.point,
                traceback=traceback.format_exc(),
            ) from error
        decided = checked(answer, Decided, "strategy", name)
        for decision in decided.decisions:
            scores = (decision.score, *(other.score for other in decision.alternatives))
            if not all(score is None or math.isfinite(score) for score in scores):  # it would not even equal itself
                raise HandlerFailed(f"strategy {name!r} gives a score that is not finite, to {decision.action}", strategy=name)
        return msgspec.structs.replace(decided, evidence=request.given)

    async def _ask_trigger(self, request: Decide) -> Decide:
        """The request with what its trigger says; asked on a thread, too."""
        name = request.settings.trigger
        trigger = self._plugins.triggers[name]
        try:
            return await anyio.to_thread.run_sync(with_signal, request, trigger.fires, abandon_on_cancel=True)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:
            raise HandlerFailed(
                f"trigger {name!r} raised {type(error).__name__} at point {request.point}: {error}",
                trigger=name,
                point=request.point,
                traceback=traceback.format_exc(),
            ) from error


def _call(reference: str, request: Decide) -> object:
    return resolve(reference)(request)
