"""The front door: what a client may ask, and which actor answers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import esperd
from esperd.actors.breaker import Breaker
from esperd.actors.system import ActorSystem
from esperd.config import Config
from esperd.daemon import dead_letters
from esperd.daemon.admission import check_keys, check_python
from esperd.daemon.allowed import check_allowed
from esperd.daemon.client_queues import ClientQueues
from esperd.errors import IllegalTransition, MalformedMessage
from esperd.messages.base import PROTOCOL_VERSION, Message, Reply
from esperd.messages.control import ActorList, Hello, ListActors, ListPlugins, PluginList, Welcome
from esperd.messages.dead_letters import DropDeadLetters, ListDeadLetters, RetryDeadLetter, ShowDeadLetter
from esperd.messages.evidence import ForgetEvidence, ListEvidence
from esperd.messages.failures import AnalyseFailure, RetryJob
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    CancelJob,
    FetchArtifact,
    GetJob,
    JobInfo,
    JobSubmitted,
    ListArtifacts,
    ListJobs,
    PauseJob,
    ResumeJob,
    SubmitJob,
)
from esperd.messages.kernels import ListKernels
from esperd.messages.overruling import ExplainDecision, ListProposals, Overrule, ReplayDecisions
from esperd.messages.telemetry import FindEvents, GetEvents
from esperd.plugins import Plugins

THIS_USER = b"this user"
"""All who come through the runtime directory: only one user can."""

ROUTES: dict[type[Message], str] = {
    SubmitJob: "jobs",
    ListJobs: "jobs",
    GetJob: "jobs",
    PauseJob: "jobs",
    ResumeJob: "jobs",
    CancelJob: "jobs",
    RetryJob: "jobs",
    AnalyseFailure: "jobs",
    ListArtifacts: "jobs",
    FetchArtifact: "jobs",
    ListKernels: "cache",
    ListEvidence: "policy",
    ForgetEvidence: "policy",
    GetEvents: "telemetry",
    FindEvents: "telemetry",
    Overrule: "policy",
    ListProposals: "policy",
    ExplainDecision: "policy",
    ReplayDecisions: "policy",
}
"""Requests that an actor answers. Whatever stands neither here nor in :class:`FrontDoor` is refused: clients may not speak
as workers do."""


class FrontDoor:
    """Answers one request of a client.

    Args:
        system: the actors.
        plugins: what was loaded.
        events_endpoint: where events are published.
        breakers: shown beside the actors.
        config: ``[jobs]`` and ``[limits]`` are used: what a job may run, and how much one client may ask.
    """

    def __init__(
        self,
        system: ActorSystem,
        plugins: Plugins,
        events_endpoint: str,
        breakers: Sequence[Breaker] = (),
        config: Config | None = None,
    ) -> None:
        self._breakers = breakers
        self._system = system
        self._plugins = plugins
        self._events_endpoint = events_endpoint
        self._config = config or Config()
        self._queues = ClientQueues(self._config.limits.queued_jobs, self._job)

    async def answer(self, _client: bytes, message: Message) -> Reply:
        """The answer to a request of this user, whichever connection it came through; see :meth:`answer_remote`."""
        return await self.answer_remote(THIS_USER, message)

    async def answer_remote(self, client: bytes, message: Message) -> Reply:
        """The answer to a request of a client that has a name of its own.

        Raises:
            MalformedMessage: a message that clients do not send.
            InvalidJob: a job's ``python`` cannot run a worker, or its options have keys that are no text.
            NotAllowed: a job names a module, interpreter or directory that the configuration does not allow.
            Busy: the client has too many jobs that wait.
            JobNotFound: decisions of a job that nobody knows.
            IllegalTransition: a word about the next decision of a job that will make none.
            EsperError: whatever the actor answered with.
        """
        match message:
            case Hello():
                return Welcome(
                    protocol=PROTOCOL_VERSION,
                    version=esperd.__version__,
                    pid=os.getpid(),
                    events_endpoint=self._events_endpoint,
                    largest_request_bytes=self._config.limits.request_bytes,
                )
            case ListActors():
                return self.actors()
            case ListDeadLetters() | ShowDeadLetter() | RetryDeadLetter() | DropDeadLetters():
                return await dead_letters.answer(self._system, message)
            case ListPlugins():
                return PluginList(plugins=self._plugins.records())
            case SubmitJob():
                return await self._submit(client, message)
            case Overrule():
                _require_decisions_to_come(await self._job(message.id))
            case FindEvents() if message.job is not None:
                await self._job(message.job)  # an unknown job is an error, and not a log without events
            case ListProposals() | ExplainDecision() | ReplayDecisions():
                await self._job(message.id)  # the policy knows decisions, and not which jobs there are
        to = ROUTES.get(type(message))
        if to is None:
            raise MalformedMessage(f"clients do not send {type(message).__name__}", message_type=type(message).__name__)
        return await self._system.ask(to, message)

    async def _submit(self, client: bytes, message: SubmitJob) -> Reply:
        check_keys(message.job)
        check_allowed(message.job, self._config.jobs)  # before its interpreter is started
        async with self._queues.place(client):
            if message.job.python:
                await check_python(message.job.python)  # here, beside other requests: it starts a process and waits for it
            submitted = await self._system.ask("jobs", message)
            if isinstance(submitted, JobSubmitted) and not submitted.duplicate:
                self._queues.note(client, submitted.id)
            return submitted

    async def _job(self, job_id: str) -> JobInfo:
        info = await self._system.ask("jobs", GetJob(id=job_id))
        assert isinstance(info, JobInfo)  # noqa: S101 - it answers nothing else
        return info

    def actors(self) -> ActorList:
        """Every actor's status, and what could not be delivered."""
        return ActorList(
            actors=self._system.status(),
            dead_letters=dict(self._system.dead_letters.counts),
            breakers=tuple(breaker.status() for breaker in self._breakers),
        )


def _require_decisions_to_come(info: JobInfo) -> None:
    """Raises: IllegalTransition: when the job is over, or grows nothing."""
    if info.state in FINAL_JOB_STATES:
        raise IllegalTransition(f"job {info.id} is {info.state}: nothing is decided any more", id=info.id, state=info.state)
    if not info.job.growth.enabled:
        raise IllegalTransition(f"job {info.id} trains its host alone (growth.enabled = false): nothing is decided", id=info.id)
