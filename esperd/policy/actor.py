"""The deciding actor: an observation in, decisions with their reasons out, each logged before it is answered."""

from __future__ import annotations

import traceback

import anyio.to_thread
import msgspec

from esperd.actors.actor import Actor, handles
from esperd.declarations import resolve
from esperd.errors import EsperError, HandlerFailed
from esperd.messages.base import Done
from esperd.messages.evidence import EvidenceForgotten, EvidenceList, ForgetEvidence, ListEvidence
from esperd.messages.policy import Conclude, Decide, Decided
from esperd.plugins import Plugins
from esperd.policy.decision_log import DecisionLog
from esperd.policy.evidence import EvidenceStore
from esperd.policy.evidence_rows import rows_of
from esperd.store.database import Database


class PolicyActor(Actor):
    """Answers :class:`~esperd.messages.policy.Decide`. Keeps nothing in memory: whichever incarnation is asked, the answer is
    the same.

    Args:
        database: opened with :data:`esperd.policy.decision_log.MIGRATIONS`.
        plugins: registered strategies.
    """

    def __init__(self, database: Database, plugins: Plugins) -> None:
        self._log = DecisionLog(database)
        self._evidence = EvidenceStore(database)
        self._plugins = plugins

    @handles(Decide)
    async def decide(self, request: Decide) -> Decided:
        """Answer as this point was answered before; otherwise decide, log, answer. Tries that ended are recorded with it.

        A resumed job replays what it was told even when it now observes something else: growth that happened once happens
        again at the same point.

        Raises:
            UnknownName: when no strategy has the name in the settings.
            ImportFailed: when the strategy's code does not import.
            HandlerFailed: when the strategy raises, or answers with something other than ``Decided``.
            StoreFailed: when the log cannot be read or written; then nothing was decided.
        """
        known = await self._log.find(request.job, request.point)
        if known is not None:
            return known
        if request.settings.memory:
            evidence, given = await self._evidence.snapshot(request.job)
            request = msgspec.structs.replace(request, evidence=evidence, given=given)
        return await self._log.append(request, await self._run_strategy(request), beside=self._evidence.record)

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
        """Decide on a thread, so that a slow strategy delays no other actor."""
        name = request.settings.strategy
        strategy = self._plugins.strategies[name]
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
        if not isinstance(answer, Decided):
            raise HandlerFailed(f"strategy {name!r} must answer with Decided, not {type(answer).__name__}", strategy=name)
        return msgspec.structs.replace(answer, evidence=request.given)


def _call(reference: str, request: Decide) -> object:
    return resolve(reference)(request)
