"""What `/metrics` shows: counters fed by events, gauges fed by the daemon."""

from __future__ import annotations

import math
from collections import Counter as Counted
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esperd.messages.control import ActorList, BreakerState
from esperd.messages.growth import Stage, Trial
from esperd.messages.jobs import FINAL_JOB_STATES, JobInfo, JobState
from esperd.messages.telemetry import (
    BreakerChanged,
    DecisionMade,
    EpochCompleted,
    Event,
    GateEvaluated,
    KernelLoaded,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrialMeasured,
)

SHORT_BUCKETS_S = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 60.0)
"""Of what waits or runs inside the daemon; chosen, not measured."""
LONG_BUCKETS_S = (1.0, 10.0, 60.0, 600.0, 3_600.0, 36_000.0, 360_000.0)
"""Of jobs: a second to four days; chosen, not measured."""
LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""From an idle loop to one that watchers notice; chosen, not measured."""

_OPENNESS = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}

_OUTCOMES = (Stage.FOSSILIZED, Stage.CULLED)


class Metrics:
    """One daemon's metrics, in a registry of their own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4
    """Of what :meth:`render` returns."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._states: dict[str, JobState] = {}
        self._actors = _Actors()
        self._registry.register(self._actors)
        self._requests = _Requests()
        self._registry.register(self._requests)
        self.loop_lag_s: float | None = None
        """As measured last; None before it was."""
        self._jobs = Gauge("esperd_jobs", "Jobs by state.", ["state"], registry=self._registry)
        self._events = self._counter("esperd_events", "Events recorded, by type.", "type")
        self._decisions = self._counter("esperd_decisions", "Decisions of the policy.", "action", "applied")
        self._breaker_changes = self._counter(
            "esperd_worker_breaker_changes", "Circuit breakers of workers, by what they became.", "service", "state"
        )
        self._gates = self._counter("esperd_gates", "Gate verdicts.", "gate", "result")
        self._seeds = self._counter("esperd_seeds", "Seeds that ended, by how.", "outcome")
        self._trials = self._counter("esperd_trials", "Controlled trials of seeds, by what they showed.", "result")
        self._screenings = self._counter("esperd_screenings", "Screenings of candidates that ended, by how.", "result")
        self._rollbacks = self._counter("esperd_rollbacks", "Catastrophes of training that were rolled back.", "action")
        self._kernels = self._counter("esperd_kernels", "Kernels that seeds run on, by where they came from.", "source")
        self._refused = self._counter("esperd_clients_refused", "Clients turned away, by what was wrong.", "reason")
        self._retention = self._counter("esperd_retention_deleted", "What retention deleted, by kind.", "kind")
        self._messages = self._counter("esperd_messages", "Messages to actors, by how they ended.", "actor", "kind", "result")
        self._waits = self._histogram("esperd_mailbox_wait_seconds", "From sent to taken out of a mailbox.", "actor")
        self._handled = self._histogram("esperd_handler_seconds", "Handlers in the daemon's process.", "actor")
        self._commits = self._histogram("esperd_commit_seconds", "Commits of the daemon's databases.", "database")
        self._compilations = self._histogram("esperd_compile_seconds", "Kernels that were compiled.", buckets=LONG_BUCKETS_S)
        self._job_waits = self._histogram("esperd_job_wait_seconds", "From submitted to training.", buckets=LONG_BUCKETS_S)
        self._job_seconds = self._histogram(
            "esperd_job_seconds", "From the first training to the end.", "state", buckets=LONG_BUCKETS_S
        )
        self._epochs = self._histogram("esperd_epoch_seconds", "Epochs, gate pass included.", "phase", buckets=LONG_BUCKETS_S)
        self._loop_lag = self._histogram(
            "esperd_loop_lag_seconds", "How late the daemon's event loop ran a timer.", buckets=LAG_BUCKETS_S
        )
        self._free = Gauge("esperd_disk_free_bytes", "Free bytes of the state directory's disk.", registry=self._registry)
        self._read_only = Gauge("esperd_read_only", "1 while the disk has no room for new work.", registry=self._registry)
        for state in JobState:
            self._jobs.labels(state.value).set(0)

    def observe_event(self, event: Event) -> None:
        """Count an event that was recorded for the first time."""
        body = event.body
        self._events.labels(type(body).__name__).inc()
        match body:
            case DecisionMade():
                self._decisions.labels(body.decision.action, "true" if body.applied else "false").inc()
            case GateEvaluated():
                self._gates.labels(body.verdict.gate, "passed" if body.verdict.passed else "failed").inc()
            case BreakerChanged():
                self._breaker_changes.labels(body.breaker.service, body.breaker.state.value).inc()
            case StageChanged() if body.after in _OUTCOMES:
                self._seeds.labels(body.after.value).inc()
            case TrialMeasured():
                self._trials.labels(_shown(body.trial)).inc()
            case ScreeningEnded():
                self._screenings.labels("none" if body.winner is None else "winner").inc()
            case RolledBack():
                self._rollbacks.labels(body.action).inc()
            case KernelLoaded():
                self._kernels.labels(body.source).inc()
            case EpochCompleted():
                self._epochs.labels(body.phase).observe(body.seconds)

    def observe_job(self, job: JobInfo) -> None:
        """Take note of where a job stands now; call it for every job at the start, then at every change.

        How long jobs waited and took is observed at changes only: a daemon that starts counts no job again.
        """
        before = self._states.get(job.id)
        if before is not None:
            self._jobs.labels(before.value).dec()
            if job.state is not before:
                self._observe_seconds(job)
        self._states[job.id] = job.state
        self._jobs.labels(job.state.value).inc()

    def forget_job(self, job_id: str) -> None:
        """A job is not there any more."""
        before = self._states.pop(job_id, None)
        if before is not None:
            self._jobs.labels(before.value).dec()

    def observe_retention(self, kind: str, number: int) -> None:
        """Count ``jobs`` or ``events`` that were deleted because of their age, or for want of room."""
        self._retention.labels(kind).inc(number)

    def observe_actors(self, actors: ActorList) -> None:
        """Show these restarts, mailboxes and dead letters from now on."""
        self._actors.observe(actors)

    def observe_requests(self, counts: Mapping[str, int]) -> None:
        """Show these counts of clients' requests, by what became of them, from now on."""
        self._requests.latest = dict(counts)

    def observe_refused_client(self, reason: str) -> None:
        """Count a client whose key was not accepted."""
        self._refused.labels(reason).inc()

    def observe_space(self, free_bytes: int | None, *, read_only: bool) -> None:
        """How much room the disk has (None: it does not say), and whether new work is refused for want of it."""
        self._free.set(math.nan if free_bytes is None else free_bytes)
        self._read_only.set(read_only)

    def observe_loop_lag(self, seconds: float) -> None:
        """How much later than asked a timer of the daemon's event loop fired."""
        self.loop_lag_s = seconds
        self._loop_lag.observe(seconds)

    def observe_message(self, actor: str, kind: str, result: str) -> None:
        """See :class:`~esperd.actors.observer.Observer`."""
        self._messages.labels(_role(actor), kind, result).inc()

    def observe_wait(self, actor: str, seconds: float) -> None:
        """See :class:`~esperd.actors.observer.Observer`."""
        self._waits.labels(_role(actor)).observe(seconds)

    def observe_handled(self, actor: str, seconds: float) -> None:
        """See :class:`~esperd.actors.observer.Observer`."""
        self._handled.labels(_role(actor)).observe(seconds)

    def observe_commit(self, database: str, seconds: float) -> None:
        """A commit of a database took this long."""
        self._commits.labels(database).observe(seconds)

    def observe_compilation(self, seconds: float) -> None:
        """A kernel took this long to compile."""
        self._compilations.observe(seconds)

    def jobs_by_state(self) -> dict[str, int]:
        """How many jobs are in each state that any is in."""
        return dict(Counted(state.value for state in self._states.values()))

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _observe_seconds(self, job: JobInfo) -> None:
        if job.state is JobState.RUNNING and job.attempt == 1 and job.started_at is not None:
            self._job_waits.observe(max(0.0, job.started_at - job.submitted_at))
        if job.state in FINAL_JOB_STATES and job.started_at is not None and job.finished_at is not None:
            self._job_seconds.labels(job.state.value).observe(max(0.0, job.finished_at - job.started_at))

    def _histogram(self, name: str, documentation: str, *labels: str, buckets: Sequence[float] = SHORT_BUCKETS_S) -> Histogram:
        return Histogram(name, documentation, labels, registry=self._registry, buckets=buckets)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)


def _role(actor: str) -> str:
    """Workers by what they do: there is one for every lease, and a series for each would never end."""
    return actor.partition("/")[0]


def _shown(trial: Trial) -> str:
    """On which side of 0 the interval of a trial lies."""
    if trial.lower > 0:
        return "helps"
    return "harms" if trial.upper < 0 else "undecided"


class _Actors(Collector):
    """Restarts and dead letters are counted by the supervisor: its latest counts are shown, not counted again."""

    def __init__(self) -> None:
        self.latest: ActorList | None = None
        self._seen: dict[str, int] = {}
        self._restarts = Counted[str]()
        """By role: an actor that is forgotten takes none of them along."""

    def observe(self, actors: ActorList) -> None:
        """Show these from now on."""
        self.latest = actors
        for actor in actors.actors:
            self._restarts[_role(actor.name)] += max(0, actor.restarts - self._seen.get(actor.name, 0))
        self._seen = {actor.name: actor.restarts for actor in actors.actors}

    def describe(self) -> list[Metric]:
        """The families, empty."""
        return list(self._families())

    def collect(self) -> Iterator[Metric]:
        """The families with the latest numbers; before any were observed, none."""
        if self.latest is None:
            return
        actors, restarts, depth, size, dead_letters, breakers = self._families()
        for (role, state), count in Counted((_role(actor.name), actor.state) for actor in self.latest.actors).items():
            actors.add_metric([role, state.value], count)
        for role, count in self._restarts.items():
            restarts.add_metric([role], count)
        depths, sizes = Counted[str](), Counted[str]()
        for actor in self.latest.actors:
            depths[_role(actor.name)] += actor.mailbox_depth
            sizes[_role(actor.name)] += actor.mailbox_bytes
        for role in depths:
            depth.add_metric([role], depths[role])
            size.add_metric([role], sizes[role])
        for reason, count in self.latest.dead_letters.items():
            dead_letters.add_metric([reason], count)
        for breaker in self.latest.breakers:
            breakers.add_metric([breaker.service], _OPENNESS[breaker.state])
        yield from (actors, restarts, depth, size, dead_letters, breakers)

    def _families(
        self,
    ) -> tuple[
        GaugeMetricFamily,
        CounterMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
        CounterMetricFamily,
        GaugeMetricFamily,
    ]:
        return (
            GaugeMetricFamily("esperd_actors", "Actors by state.", labels=["actor", "state"]),
            CounterMetricFamily("esperd_restarts", "Restarts of an actor.", labels=["actor"]),
            GaugeMetricFamily("esperd_mailbox_depth", "Messages that wait for an actor.", labels=["actor"]),
            GaugeMetricFamily("esperd_mailbox_bytes", "Payload bytes that wait for an actor.", labels=["actor"]),
            CounterMetricFamily("esperd_dead_letters", "Messages that could not be delivered.", labels=["reason"]),
            GaugeMetricFamily("esperd_breaker_state", "Circuit breakers: 0 closed, 1 half open, 2 open.", labels=["service"]),
        )


class _Requests(Collector):
    """Requests are counted by the server that answers them: its latest counts are shown, not counted again."""

    def __init__(self) -> None:
        self.latest: dict[str, int] = {}

    def describe(self) -> list[Metric]:
        """The family, empty."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        """The family with the latest numbers."""
        family = self._family()
        for result, count in self.latest.items():
            family.add_metric([result], count)
        yield family

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily("esperd_requests", "Requests of clients, by what became of them.", labels=["result"])
