"""The deciding actor: an observation in, decisions with their reasons out, each logged before it is answered."""

from __future__ import annotations

import traceback

import anyio.to_thread

from esperd.actors.actor import Actor, handles
from esperd.declarations import resolve
from esperd.errors import EsperError, HandlerFailed
from esperd.messages.policy import Decide, Decided
from esperd.plugins import Plugins
from esperd.policy.decision_log import DecisionLog
from esperd.policy.trigger import with_signal
from esperd.store.database import Database


class PolicyActor(Actor):
    """Answers :class:`~esperd.messages.policy.Decide`. Keeps nothing in memory: whichever incarnation is asked, the answer is
    the same.

    Args:
        database: opened with :data:`esperd.policy.decision_log.MIGRATIONS`.
        plugins: registered strategies and triggers.
    """

    def __init__(self, database: Database, plugins: Plugins) -> None:
        self._log = DecisionLog(database)
        self._plugins = plugins

    @handles(Decide)
    async def decide(self, request: Decide) -> Decided:
        """Answer as this point was answered before; otherwise decide, log, answer.

        A resumed job replays what it was told even when it now observes something else: growth that happened once happens
        again at the same point.

        Raises:
            UnknownName: when no strategy, or no trigger, has the name in the settings.
            ImportFailed: when the code of either does not import.
            HandlerFailed: when either raises, or answers with something other than ``Decided``, or ``Signal``.
            StoreFailed: when the log cannot be read or written; then nothing was decided.
        """
        known = await self._log.find(request.job, request.point)
        if known is not None:
            return known
        return await self._log.append(request, await self._run_strategy(request))

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
        if not isinstance(answer, Decided):
            raise HandlerFailed(f"strategy {name!r} must answer with Decided, not {type(answer).__name__}", strategy=name)
        return answer

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
