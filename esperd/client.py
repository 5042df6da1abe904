"""Talk to a daemon: :class:`Client`. What user scripts import; torch-free. Its blocking twin is in :mod:`esperd.sync_client`."""

from __future__ import annotations

import getpass
import hashlib
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec

from esperd import __version__
from esperd.actors.keys import security_of
from esperd.actors.publication import Subscriber
from esperd.actors.requests import RequestClient
from esperd.actors.retrying import asked_patiently
from esperd.actors.sockets import is_remote
from esperd.config import endpoint as socket_endpoint
from esperd.config import load_config
from esperd.errors import InvalidJob, MalformedMessage, NothingToShow, ProtocolMismatch, StoreFailed
from esperd.jobfile import check_job, job_from, load_job
from esperd.messages.base import PROTOCOL_VERSION, Message, Reply
from esperd.messages.card import CARD, is_users_own
from esperd.messages.control import ActorList, Hello, ListActors, ListPlugins, PluginList, Welcome
from esperd.messages.evidence import EvidenceForgotten, EvidenceList, ForgetEvidence, ListEvidence
from esperd.messages.failures import AnalyseFailure, FailureAnalysis, RetryJob
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    Artifact,
    ArtifactChunk,
    ArtifactList,
    CancelJob,
    FetchArtifact,
    GetJob,
    Job,
    JobInfo,
    JobList,
    JobState,
    JobSubmitted,
    ListArtifacts,
    ListJobs,
    PauseJob,
    ResumeJob,
    SubmitJob,
)
from esperd.messages.kernels import KernelList, ListKernels
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
    Wish,
)
from esperd.messages.reports import Report
from esperd.messages.telemetry import Event, EventPage, GetEvents, JobStateChanged

ReplyT = TypeVar("ReplyT", bound=Reply)
ResultT = TypeVar("ResultT")

ENDPOINT_VARIABLE = "ESPERD_ENDPOINT"
REPORT = "report.json"
POLL_INTERVAL_S = 2.0
"""How long a watcher waits for a published event before it looks into the log itself; chosen, not measured."""


def default_endpoint() -> str:
    """Where the daemon of this user listens: ``$ESPERD_ENDPOINT``, else the socket in the configured runtime directory.

    Raises:
        ConfigError: when an ``ESPERD__…`` variable is wrong or the socket's path is too long.
    """
    return os.environ.get(ENDPOINT_VARIABLE) or socket_endpoint(load_config().runtime_directory, "control")


def user_name() -> str:
    """Who speaks, as the operating system calls them: the login name, else the number of the user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that no name belongs to
        return f"uid {os.getuid()}"


class Client:
    """An async connection to a daemon, used as ``async with Client() as esper``.

    Args:
        endpoint: ZeroMQ endpoint of the daemon; None: :func:`default_endpoint`.
        timeout_s: longest wait for one answer, in seconds.
        patience_s: for how long a request that the daemon was too busy for, or that is safe to repeat, is asked again.
        server_key: for ``tcp://``: the daemon's public key, 64 hexadecimal digits or a file; None: ``$ESPERD_SERVER_KEY``.
        client_key: for ``tcp://``: the file of your own secret key; None: ``$ESPERD_CLIENT_KEY``.

    Raises:
        AuthenticationFailed: on entering, when the daemon refuses this client, or is another one than its key says.
        ConfigError: when a key is none, or only one of the two is given.
        DaemonUnreachable: on entering, when no daemon answers.
        ProtocolMismatch: on entering, when the daemon speaks another protocol version.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = 10.0,
        patience_s: float = 15.0,
        *,
        server_key: str | None = None,
        client_key: os.PathLike[str] | str | None = None,
    ) -> None:
        self.endpoint = endpoint or default_endpoint()
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self._security = security_of(self.endpoint, server_key, client_key)
        self._requests = RequestClient(self.endpoint, timeout_s, security=self._security)
        self._open = AsyncExitStack()
        self._welcome: Welcome | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            await opening.enter_async_context(self._requests)
            hello = Hello(protocol=PROTOCOL_VERSION, version=__version__, reached_at=self.endpoint if self.is_remote else "")
            welcome = await self.ask(hello, Welcome)
            if welcome.protocol != PROTOCOL_VERSION:
                older = "client" if welcome.protocol > PROTOCOL_VERSION else "daemon"
                raise ProtocolMismatch(
                    f"this client speaks protocol {PROTOCOL_VERSION} and the daemon {welcome.protocol} "
                    f"(esperd {welcome.version}); upgrade the {older}",
                    client=PROTOCOL_VERSION,
                    daemon=welcome.protocol,
                )
            self._welcome = welcome
            self._requests.largest_request_bytes = welcome.largest_request_bytes
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._open.aclose()

    @property
    def daemon(self) -> Welcome:
        """What the daemon said of itself: version, process id, where it publishes events.

        Raises:
            RuntimeError: when the client is not open.
        """
        if self._welcome is None:
            raise RuntimeError("the client is not open; use it as `async with Client() as esper`")
        return self._welcome

    @property
    def is_remote(self) -> bool:
        """True when the daemon may be on another machine: paths mean nothing here then."""
        return is_remote(self.endpoint)

    def events(self, topics: Sequence[str]) -> Subscriber:
        """What the daemon publishes under these topics, from the moment it is opened."""
        return Subscriber(self.daemon.events_endpoint, topics, security=self._security)

    async def ask(self, message: Message, answer: type[ReplyT], *, watching: bool = False) -> ReplyT:
        """Send a request and return its answer; a daemon that is busy is asked again, when it says.

        Args:
            message: the request.
            answer: its kind of answer.
            watching: ask again, for ``patience_s``, where nothing answers within ``timeout_s``: the line may have been cut.

        Raises:
            EsperError: whatever the daemon answers with, as the class its code names.
            AskTimeout: when nothing answers within ``timeout_s``.
        """
        reply = await asked_patiently(lambda: self._requests.request(message), message, self.patience_s, watching=watching)
        if not isinstance(reply, answer):
            raise ProtocolMismatch(
                f"the daemon answered {type(message).__name__} with {type(reply).__name__}, not {answer.__name__}; "
                "client and daemon are of different versions"
            )
        return reply

    async def submit(
        self, job: Job | Mapping[str, Any] | os.PathLike[str] | str, *, idempotency_key: str | None = None
    ) -> JobHandle:
        """Hand a job to the daemon; it is durable when this returns.

        Args:
            job: a Job, the path of a job file, or its tables as a dictionary. A relative ``workdir`` is relative to the
                file's folder, else to the current one.
            idempotency_key: submitting the same job under the same key again returns the first one. None: a fresh key.

        Raises:
            InvalidJob: when the job is malformed or its ``workdir`` is no directory.
            Conflict: when the key was used with another job.
            Busy: when the daemon's queue is full.
        """
        checked = _read_job(job)
        if not self.is_remote and not await anyio.Path(checked.workdir).is_dir():
            raise InvalidJob(f"workdir {checked.workdir} is not a directory", key="workdir", value=checked.workdir)
        key = idempotency_key or str(uuid.uuid4())
        submitted = await self.ask(SubmitJob(job=checked, idempotency_key=key), JobSubmitted)
        return JobHandle(self, submitted.id, duplicate=submitted.duplicate)

    async def jobs(self, limit: int = 100) -> tuple[JobInfo, ...]:
        """Jobs, newest first, at most ``limit``."""
        return (await self.ask(ListJobs(limit=limit), JobList)).jobs

    def job(self, job_id: str) -> JobHandle:
        """A handle on a job by its id; whether it exists shows at the first request."""
        return JobHandle(self, job_id)

    async def actors(self) -> ActorList:
        """Every actor of the daemon, and its dead letters by reason."""
        return await self.ask(ListActors(), ActorList)

    async def kernels(self) -> KernelList:
        """Every kernel in the daemon's cache, and the cache's counters."""
        return await self.ask(ListKernels(), KernelList)

    async def plugins(self) -> PluginList:
        """Every plugin the daemon loaded or failed to load."""
        return await self.ask(ListPlugins(), PluginList)

    async def evidence(self, blueprint: str = "*", job: str | None = None) -> EvidenceList:
        """What tries of seeds came to, in every job or in one.

        Args:
            blueprint: a name or a shell pattern.
            job: id of a job; None: all of them.
        """
        return await self.ask(ListEvidence(blueprint=blueprint, job=job), EvidenceList)

    async def forget_evidence(self, blueprint: str) -> int:
        """Delete what is known of tries; durable on return. Jobs keep what they were given.

        Args:
            blueprint: a name or a shell pattern; ``*``: everything.

        Returns:
            How many tries were forgotten.
        """
        return (await self.ask(ForgetEvidence(blueprint=blueprint), EvidenceForgotten)).tries


class JobHandle:
    """One job of a daemon. Every method raises ``JobNotFound`` when no job has the id."""

    def __init__(self, client: Client, job_id: str, *, duplicate: bool = False) -> None:
        self._client = client
        self.id = job_id
        self.duplicate = duplicate
        """True when submitting found the job already there, under the same idempotency key."""

    async def info(self) -> JobInfo:
        """The job as the daemon knows it."""
        return await self._client.ask(GetJob(id=self.id), JobInfo)

    async def _watched(self) -> JobInfo:
        return await self._client.ask(GetJob(id=self.id), JobInfo, watching=True)

    async def pause(self) -> JobInfo:
        """Checkpoint and stop, to be resumed later.

        Raises:
            IllegalTransition: when the job is over.
        """
        return await self._client.ask(PauseJob(id=self.id), JobInfo)

    async def resume(self) -> JobInfo:
        """Queue a paused job again.

        Raises:
            IllegalTransition: when the job is not paused.
        """
        return await self._client.ask(ResumeJob(id=self.id), JobInfo)

    async def cancel(self) -> JobInfo:
        """Stop the job for good.

        Raises:
            IllegalTransition: when the job is over.
        """
        return await self._client.ask(CancelJob(id=self.id), JobInfo)

    async def retry(self) -> JobInfo:
        """Queue a failed or dead job again: it goes on from its last good checkpoint, with all its attempts before it.

        Raises:
            IllegalTransition: when it has not failed.
            ReadOnly: while the daemon's disk is full.
        """
        return await self._client.ask(RetryJob(id=self.id), JobInfo)

    async def failure(self) -> FailureAnalysis:
        """Why the job failed: where, since when, what is different, what to try.

        Raises:
            NothingToShow: when no attempt at it failed.
        """
        return await self._client.ask(AnalyseFailure(id=self.id), FailureAnalysis)

    async def overrule(
        self, wish: Wish, *, slot: str = "", blueprint: str = "", seed: str = "", number: int | None = None, reason: str = ""
    ) -> Overruled:
        """Say what is to be decided at the job's next decision point; durable when this returns. Gates still have their word.

        Args:
            wish: ``grow`` (with ``slot`` and ``blueprint``), ``keep`` or ``cull`` (with ``seed``), ``wait``: grow nothing, or
                ``approve`` what the policy proposed.
            slot: of the arm to grow.
            blueprint: of the arm to grow.
            seed: which seed.
            number: which of :meth:`proposals` to approve, from 1; None: all.
            reason: why, in the person's words.

        Raises:
            UnknownName: when the job's last decision point knew no such slot, blueprint or seed.
            IllegalTransition: when the job or the seed is over, or the job grows nothing.
            NothingToShow: when there is nothing to approve.
        """
        said = Overrule(
            id=self.id, wish=wish, by=user_name(), reason=reason, slot=slot, blueprint=blueprint, seed=seed, number=number
        )
        return await self._client.ask(said, Overruled)

    async def proposals(self) -> ProposalList:
        """What awaits approval, and what people said for the next decision point."""
        return await self._client.ask(ListProposals(id=self.id), ProposalList)

    async def decision(self, point: int) -> LoggedDecision:
        """A decision point: what was observed and what was decided.

        Raises:
            NothingToShow: when the job had no such point.
        """
        return await self._client.ask(ExplainDecision(id=self.id, point=point), LoggedDecision)

    async def replay(self) -> tuple[ReplayedPoint, ...]:
        """Have the daemon compute every decision of the job again, from what was logged, and say which differ."""
        points: list[ReplayedPoint] = []
        more = True
        while more:
            page = await self._client.ask(ReplayDecisions(id=self.id, after=points[-1].point if points else 0), ReplayPage)
            points += page.points
            more = page.more and bool(page.points)
        return tuple(points)

    async def events(self, after: int = 0) -> tuple[Event, ...]:
        """Events in the daemon's log with a sequence above ``after``, oldest first."""
        return tuple([event async for event in self._logged(after)])

    async def watch(self, after: int = 0) -> AsyncGenerator[Event, None]:
        """Events as they happen, each exactly once and in order, until the job is over.

        What happened before is read from the log. Publication may lose events (a slow watcher, a restarted daemon), so a
        gap in the sequence, or silence, sends the watcher back to the log. A daemon that does not answer is asked again for the
        client's ``patience_s``: a line that was cut and carries again is not noticed.

        Args:
            after: skip events up to this sequence.
        """
        seen = after
        job_was_over = False
        async with self._client.events([f"job/{self.id}"]) as publication:
            await self._watched()  # an unknown job is an error, not an endless silence
            look = True
            while True:
                if look:
                    async for event in self._logged(seen):
                        seen = event.sequence
                        yield event
                        if await self._ended_with(event):
                            return
                    if job_was_over:
                        return
                published = await _next_event(publication)
                look = published is None or published.sequence > seen + 1
                if published is None:
                    job_was_over = (await self._watched()).state in FINAL_JOB_STATES
                elif published.sequence == seen + 1:
                    seen = published.sequence
                    yield published
                    if await self._ended_with(published):
                        return

    async def _ended_with(self, event: Event) -> bool:
        """Whether this event is the job's last: one that failed may have been tried again since."""
        if not _is_final(event):
            return False
        assert isinstance(event.body, JobStateChanged)  # noqa: S101 - nothing else is final
        info = await self._watched()
        return info.state is not JobState.QUEUED and info.attempt <= event.body.attempt

    async def wait(self) -> JobInfo:
        """Wait until the job is over, however it ends."""
        async with aclosing(self.watch()) as events:
            async for _ in events:
                pass
        return await self._watched()

    async def report(self) -> Report:
        """What the finished job found.

        Raises:
            NothingToShow: when it has not succeeded (yet).
        """
        return msgspec.json.decode(await self.fetch(REPORT), type=Report)

    async def artifacts(self) -> tuple[Artifact, ...]:
        """Files the job left in the daemon's store; empty before it succeeds."""
        return (await self._client.ask(ListArtifacts(id=self.id), ArtifactList)).artifacts

    async def fetch(self, name: str) -> bytes:
        """One artifact's content, verified against its hash.

        Raises:
            NothingToShow: when the job has no artifact of this name (yet).
            StoreFailed: when the content that arrived is not what was stored.
        """
        artifacts = await self.artifacts()
        wanted = next((artifact for artifact in artifacts if artifact.name == name), None)
        if wanted is None:
            raise await self._missing(name, artifacts)
        return await self._download(wanted)

    async def export(self, directory: os.PathLike[str] | str) -> tuple[Path, ...]:
        """Write the grown model and its records into a directory, which is made when it does not exist.

        ``esperd.load(directory)`` rebuilds the model with no daemon. A ``README.md`` that is not esperd's, or was made the user's
        own, is left alone.

        Returns:
            The files that were written.

        Raises:
            NothingToShow: when the job has not succeeded (yet).
            OSError: when the directory cannot be written.
        """
        artifacts = await self.artifacts()
        if not artifacts:
            raise await self._missing("model.safetensors", artifacts)
        target = Path(directory)
        written: list[Path] = []
        for artifact in artifacts:
            if artifact.name == CARD and await anyio.to_thread.run_sync(is_users_own, target / CARD):
                continue
            content = await self._download(artifact)
            written.append(await anyio.to_thread.run_sync(_write, target, artifact.name, content))
        return tuple(written)

    async def _logged(self, after: int) -> AsyncGenerator[Event, None]:
        more = True
        while more:
            page = await self._client.ask(GetEvents(job=self.id, after=after), EventPage, watching=True)
            for event in page.events:
                after = event.sequence
                yield event
            more = page.more and bool(page.events)

    async def _download(self, artifact: Artifact) -> bytes:
        content = bytearray()
        while len(content) < artifact.size_bytes:
            request = FetchArtifact(id=self.id, name=artifact.name, offset=len(content))
            chunk = await self._client.ask(request, ArtifactChunk)
            if not chunk.data:
                break
            content += chunk.data
        digest = hashlib.sha256(content).hexdigest()
        if digest != artifact.sha256:
            raise StoreFailed(
                f"{artifact.name} of job {self.id} arrived damaged: its hash is {digest}, not {artifact.sha256}",
                job=self.id,
                name=artifact.name,
            )
        return bytes(content)

    async def _missing(self, name: str, artifacts: tuple[Artifact, ...]) -> NothingToShow:
        state = (await self.info()).state
        if artifacts:
            there = ", ".join(artifact.name for artifact in artifacts)
            message = f"job {self.id} left no {name}; there are: {there}"
        else:
            message = f"job {self.id} is {state}; it has no {name} before it has succeeded"
        return NothingToShow(message, job=self.id, state=str(state), name=name)


def _read_job(job: Job | Mapping[str, Any] | os.PathLike[str] | str) -> Job:
    if isinstance(job, Job):
        return check_job(job, Path.cwd())
    if isinstance(job, Mapping):
        return job_from(job, Path.cwd())
    return load_job(Path(job))


async def _next_event(publication: Subscriber) -> Event | None:
    """The next published event; None after :data:`POLL_INTERVAL_S` of silence."""
    with anyio.move_on_after(POLL_INTERVAL_S):
        topic, payload = await anext(publication)
        try:
            return msgspec.msgpack.decode(payload, type=Event)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise MalformedMessage(f"what was published under {topic} is not an event: {error}", topic=topic) from error
    return None


def _is_final(event: Event) -> bool:
    return isinstance(event.body, JobStateChanged) and event.body.state in FINAL_JOB_STATES


def _write(directory: Path, name: str, content: bytes) -> Path:
    """Write a file whole or not at all; its name may not lead out of the directory."""
    if Path(name).name != name:
        raise StoreFailed(f"the daemon named an artifact {name!r}, which is not a file name", name=name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    partial = directory / f".{name}.{uuid.uuid4().hex}"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
