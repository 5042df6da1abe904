"""A daemon's two sockets, real, answering from a script. For tests of what talks to a daemon."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import synthetic_job

from esperd import __version__
from esperd.actors.publication import Publisher
from esperd.actors.requests import RequestServer
from esperd.errors import Conflict, JobNotFound, NothingToShow, ProtocolMismatch
from esperd.messages.base import PROTOCOL_VERSION, Message, Reply
from esperd.messages.control import (
    ActorList,
    ActorState,
    ActorStatus,
    BreakerState,
    BreakerStatus,
    Hello,
    ListActors,
    ListPlugins,
    PluginList,
    PluginRecord,
    Welcome,
)
from esperd.messages.evidence import EvidenceForgotten, EvidenceList, EvidenceRow, ForgetEvidence, ListEvidence
from esperd.messages.jobs import (
    Artifact,
    ArtifactChunk,
    ArtifactList,
    CancelJob,
    FetchArtifact,
    GetJob,
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
from esperd.messages.kernels import KernelKey, KernelList, KernelRow, ListKernels, Profile
from esperd.messages.overruling import (
    ExplainDecision,
    ListProposals,
    LoggedDecision,
    Overrule,
    ProposalList,
    ReplayDecisions,
    ReplayedPoint,
    ReplayPage,
)
from esperd.messages.telemetry import Event, EventPage, GetEvents
from esperd.policy.wishes import decisions_of

ACTORS = ActorList(
    actors=(
        ActorStatus(
            name="policy",
            state=ActorState.RUNNING,
            pid=4242,
            generation=1,
            restarts=0,
            mailbox_depth=0,
            mailbox_bytes=0,
            handled=17,
        ),
        ActorStatus(
            name="compiler",
            state=ActorState.WAITING,
            pid=None,
            generation=2,
            restarts=1,
            mailbox_depth=3,
            mailbox_bytes=2100,
            handled=4,
            last_error="exit status -9",
        ),
        ActorStatus(
            name="trainer/j1.1",
            state=ActorState.RUNNING,
            pid=4243,
            generation=1,
            restarts=0,
            mailbox_depth=0,
            mailbox_bytes=0,
            handled=1,
            breakers=(
                BreakerStatus(service="policy", state=BreakerState.OPEN, failures=3, opened=1, retry_after_s=9.0),
                BreakerStatus(service="cache", state=BreakerState.CLOSED, failures=0, opened=0),
            ),
        ),
    ),
    dead_letters={"actor_unavailable": 2},
)
KERNELS = KernelList(
    kernels=(
        KernelRow(
            manifest_id="c0ffee" * 10 + "abcd",
            key=KernelKey(blueprint="conv_residual", source="ab" * 32, shape=(16, 8, 8)),
            parameters=2368,
            flops_per_sample=294_912.0,
            size_bytes=12_345,
            hits=3,
            created_at=1_700_000_000.0,
            last_used_at=1_700_000_100.0,
            profile=Profile(batch=64, forward_us=410.0, backward_us=900.0),
        ),
    ),
    hits=3,
    misses=1,
    quarantined=0,
)
EVIDENCE = EvidenceList(
    rows=(
        EvidenceRow(
            blueprint="conv_residual",
            topology="cnn",
            third=2,
            tries=7,
            kept=3,
            refused=1,
            jobs=2,
            contribution=0.0312,
            lower=0.0201,
            upper=0.0423,
            gain=0.0271,
            reward=0.0105,
            incubation_loss=0.61,
            gradient_ratio=0.8,
            activation_bytes=8192.0,
            parameters=(592, 2368),
            flops_per_sample=(73_728.0, 294_912.0),
            newest=1_700_000_000.0,
        ),
        EvidenceRow(
            blueprint="refused_everywhere",
            topology=None,
            third=None,
            tries=2,
            kept=0,
            refused=2,
            jobs=1,
            contribution=None,
            lower=None,
            upper=None,
            gain=None,
            reward=-0.002,
            incubation_loss=None,
            gradient_ratio=None,
            activation_bytes=None,
            parameters=(10, 10),
            flops_per_sample=(20.0, 20.0),
            newest=1_700_000_050.0,
        ),
    )
)
PLUGINS = PluginList(
    plugins=(
        PluginRecord(name="builtins.hosts", distribution=None, registered={"hosts": ["cnn", "mlp"]}),
        PluginRecord(
            name="broken",
            distribution="esperd-broken 0.1",
            registered={},
            error="Traceback (most recent call last):\nImportError: no module named 'nowhere'\n",
        ),
    )
)
LISTINGS = {ListActors: ACTORS, ListKernels: KERNELS, ListPlugins: PLUGINS, ListEvidence: EVIDENCE}
CHUNK_BYTES = 1000


@dataclass
class ScriptedDaemon:
    """Answers as a daemon with one job would; what it answers are its fields, changed by tests as they go."""

    directory: Path
    protocol: int = PROTOCOL_VERSION
    state: JobState = JobState.RUNNING
    log: list[Event] = field(default_factory=list)
    page_size: int = 7
    artifacts: dict[str, bytes] = field(default_factory=dict)
    asked: list[Message] = field(default_factory=list)
    corrupt: bool = False
    decisions: dict[int, LoggedDecision] = field(default_factory=dict)
    proposals: ProposalList = field(default_factory=lambda: ProposalList(point=None, proposals=(), said=()))
    replayed: tuple[ReplayedPoint, ...] = ()
    approve: bool = False

    def __post_init__(self) -> None:
        self.endpoint = f"ipc://{self.directory}/control.sock"
        self._events_endpoint = f"ipc://{self.directory}/events.sock"
        self._keys: dict[str, object] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedDaemon]:
        self.publisher = Publisher(self._events_endpoint)
        async with self.publisher, RequestServer(self.endpoint, self._answer):
            yield self

    async def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            await self.publisher.publish(f"job/{event.job}", msgspec.msgpack.encode(event))

    def info(self) -> JobInfo:
        info = synthetic_job.info(self.state)
        policy = msgspec.structs.replace(info.job.policy, approve=self.approve)
        return msgspec.structs.replace(info, job=msgspec.structs.replace(info.job, policy=policy))

    async def _answer(self, client: bytes, message: Message) -> Reply:
        self.asked.append(message)
        if getattr(message, "id", synthetic_job.JOB_ID) != synthetic_job.JOB_ID:
            raise JobNotFound(f"there is no job {message.id!r}; `esper jobs` lists them", job=message.id)
        match message:
            case Hello():
                if message.protocol != self.protocol:
                    raise ProtocolMismatch(f"the daemon speaks protocol {self.protocol}", daemon=self.protocol)
                return Welcome(protocol=self.protocol, version=__version__, pid=1, events_endpoint=self._events_endpoint)
            case SubmitJob():
                before = self._keys.setdefault(message.idempotency_key, message.job)
                if before != message.job:
                    raise Conflict(f"key {message.idempotency_key!r} was used with another job")
                again = sum(isinstance(asked, SubmitJob) for asked in self.asked) > 1
                return JobSubmitted(id=synthetic_job.JOB_ID, duplicate=again)
            case ListJobs():
                return JobList(jobs=(self.info(),))
            case GetJob() | PauseJob() | ResumeJob() | CancelJob():
                return self.info()
            case GetEvents():
                later = [event for event in self.log if event.sequence > message.after]
                page = later[: min(self.page_size, message.limit)]
                return EventPage(events=tuple(page), more=len(later) > len(page))
            case ListArtifacts() | FetchArtifact():
                return self._artifact(message)
            case Overrule() | ListProposals() | ExplainDecision() | ReplayDecisions():
                return self._about_decisions(message)
            case ListActors() | ListKernels() | ListPlugins() | ListEvidence():
                return LISTINGS[type(message)]
            case ForgetEvidence():
                return EvidenceForgotten(tries=sum(row.tries for row in EVIDENCE.rows))
        raise AssertionError(f"not in the script: {message!r}")

    def _about_decisions(self, message: Overrule | ListProposals | ExplainDecision | ReplayDecisions) -> Reply:
        match message:
            case Overrule():
                last = self.decisions[max(self.decisions)]
                return decisions_of(message, last.request.observation, last.answer)
            case ListProposals():
                return self.proposals
            case ExplainDecision():
                if message.point not in self.decisions:
                    raise NothingToShow(f"job {message.id} has no decision point {message.point}", point=message.point)
                return self.decisions[message.point]
        later = [found for found in self.replayed if found.point > message.after]
        return ReplayPage(points=tuple(later[:2]), more=len(later) > 2)

    def _artifact(self, message: ListArtifacts | FetchArtifact) -> Reply:
        if isinstance(message, ListArtifacts):
            listed = [
                Artifact(name=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
                for name, content in self.artifacts.items()
            ]
            return ArtifactList(artifacts=tuple(listed))
        content = self.artifacts[message.name]
        if self.corrupt:
            content = b"\x00" * len(content)
        chunk = content[message.offset : message.offset + CHUNK_BYTES]
        return ArtifactChunk(offset=message.offset, data=chunk, size_bytes=len(content))
