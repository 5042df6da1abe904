"""Asking again where that is safe: at the edge only, with backoff, and not before the daemon said so.

Inside the daemon nothing is retried by this: supervisors and leases know better. stamina is imported when something has to be
asked again, and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

from esperd.errors import ActorUnavailable, AskTimeout, Busy, EsperError
from esperd.messages.base import Message, Reply
from esperd.messages.control import Hello, ListActors, ListPlugins
from esperd.messages.dead_letters import ListDeadLetters, ShowDeadLetter
from esperd.messages.evidence import ListEvidence
from esperd.messages.failures import AnalyseFailure
from esperd.messages.jobs import FetchArtifact, GetJob, ListArtifacts, ListJobs, SubmitJob
from esperd.messages.kernels import ListKernels
from esperd.messages.overruling import ExplainDecision, ListProposals, ReplayDecisions
from esperd.messages.telemetry import FindEvents, GetEvents

IDEMPOTENT: tuple[type[Message], ...] = (
    Hello,
    ListActors,
    ListPlugins,
    ListJobs,
    GetJob,
    ListArtifacts,
    FetchArtifact,
    ListKernels,
    ListEvidence,
    GetEvents,
    ListProposals,
    ExplainDecision,
    ReplayDecisions,
    AnalyseFailure,
    ListDeadLetters,
    ShowDeadLetter,
    FindEvents,
    SubmitJob,
)
"""Requests that come to the same however often they are carried out: those that only read, and a submission, by its key."""

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0
"""Between two tries where the daemon does not say when; chosen, not measured."""


def wait_before_retry(message: Message, error: Exception, *, watching: bool = False) -> bool | float:
    """Whether to ask again, or after how many seconds.

    ``Busy`` says that nothing was carried out, so anything may be asked again, when it says. An actor between two incarnations
    may have carried the request out before it ended. Whoever asks says how long it waits for an answer; a watcher waits for
    the end of a job, and what does not answer in time may have been cut off for a while.
    """
    if isinstance(error, Busy):
        after = error.fields.get("retry_after_s")
        return float(after) if isinstance(after, int | float) else True
    passes = (ActorUnavailable, AskTimeout) if watching else ActorUnavailable
    return isinstance(error, passes) and isinstance(message, IDEMPOTENT)


async def asked_patiently(
    ask: Callable[[], Awaitable[Reply]], message: Message, patience_s: float, *, watching: bool = False
) -> Reply:
    """The answer to a request, asked again while that is safe.

    Args:
        ask: asks once.
        message: what is asked.
        patience_s: no new try begins later than this; 0: there is one try.
        watching: whether an answer that does not come in time is waited for, too.

    Raises:
        EsperError: of the last try.
    """
    try:
        return await ask()
    except EsperError as error:
        if not patience_s or wait_before_retry(message, error, watching=watching) is False:
            raise
        first: Exception | None = error
    _import_quietly()
    from stamina import AsyncRetryingCaller

    async def once() -> Reply:
        nonlocal first
        if first is not None:  # the first try's error is the first try here: it decides how long the first wait is
            refused, first = first, None
            raise refused
        return await ask()

    patient = AsyncRetryingCaller(attempts=None, timeout=patience_s, wait_initial=FIRST_WAIT_S, wait_max=LONGEST_WAIT_S)
    return await patient(lambda refused: wait_before_retry(message, refused, watching=watching), once)


def _import_quietly() -> None:
    """Import stamina. It tells of every try through structlog, which writes to stdout unless somebody configured it: where nobody
    in this process has come to either of them, stdout is the program's own.
    """
    if sys.modules.keys().isdisjoint({"stamina", "structlog"}):
        from stamina import instrumentation

        instrumentation.set_on_retry_hooks(())
