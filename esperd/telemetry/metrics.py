"""What `/metrics` shows: counters fed by events, gauges fed by the daemon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esperd.messages.control import ActorList
from esperd.messages.growth import Stage, Trial
from esperd.messages.jobs import JobInfo, JobState
from esperd.messages.telemetry import (
    DecisionMade,
    Event,
    GateEvaluated,
    KernelLoaded,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrialMeasured,
)

LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""From an idle loop to one that watchers notice; chosen, not measured."""

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
        self._jobs = Gauge("esperd_jobs", "Jobs by state.", ["state"], registry=self._registry)
        self._events = self._counter("esperd_events", "Events recorded, by type.", "type")
        self._decisions = self._counter("esperd_decisions", "Decisions of the policy.", "action", "applied")
        self._gates = self._counter("esperd_gates", "Gate verdicts.", "gate", "result")
        self._seeds = self._counter("esperd_seeds", "Seeds that ended, by how.", "outcome")
        self._trials = self._counter("esperd_trials", "Controlled trials of seeds, by what they showed.", "result")
        self._screenings = self._counter("esperd_screenings", "Screenings of candidates that ended, by how.", "result")
        self._rollbacks = self._counter("esperd_rollbacks", "Catastrophes of training that were rolled back.", "action")
        self._kernels = self._counter("esperd_kernels", "Kernels that seeds run on, by where they came from.", "source")
        self._refused = self._counter("esperd_clients_refused", "Clients turned away, by what was wrong.", "reason")
        self._loop_lag = Histogram(
            "esperd_loop_lag_seconds",
            "How late the daemon's event loop ran a timer.",
            registry=self._registry,
            buckets=LAG_BUCKETS_S,
        )
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

    def observe_job(self, job: JobInfo) -> None:
        """Take note of where a job stands now; call it for every job at the start, then at every change."""
        before = self._states.get(job.id)
        if before is not None:
            self._jobs.labels(before.value).dec()
        self._states[job.id] = job.state
        self._jobs.labels(job.state.value).inc()

    def observe_actors(self, actors: ActorList) -> None:
        """Show these restarts, mailboxes and dead letters from now on."""
        self._actors.latest = actors

    def observe_requests(self, counts: Mapping[str, int]) -> None:
        """Show these counts of clients' requests, by what became of them, from now on."""
        self._requests.latest = dict(counts)

    def observe_refused_client(self, reason: str) -> None:
        """Count a client whose key was not accepted."""
        self._refused.labels(reason).inc()

    def observe_loop_lag(self, seconds: float) -> None:
        """How much later than asked a timer of the daemon's event loop fired."""
        self._loop_lag.observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)


def _shown(trial: Trial) -> str:
    """On which side of 0 the interval of a trial lies."""
    if trial.lower > 0:
        return "helps"
    return "harms" if trial.upper < 0 else "undecided"


class _Actors(Collector):
    """Restarts and dead letters are counted by the supervisor: its latest counts are shown, not counted again."""

    def __init__(self) -> None:
        self.latest: ActorList | None = None

    def describe(self) -> list[Metric]:
        """The families, empty."""
        return list(self._families())

    def collect(self) -> Iterator[Metric]:
        """The families with the latest numbers; before any were observed, none."""
        if self.latest is None:
            return
        restarts, depth, dead_letters = self._families()
        for actor in self.latest.actors:
            restarts.add_metric([actor.name], actor.restarts)
            depth.add_metric([actor.name], actor.mailbox_depth)
        for reason, count in self.latest.dead_letters.items():
            dead_letters.add_metric([reason], count)
        yield from (restarts, depth, dead_letters)

    def _families(self) -> tuple[CounterMetricFamily, GaugeMetricFamily, CounterMetricFamily]:
        return (
            CounterMetricFamily("esperd_restarts", "Restarts of an actor.", labels=["actor"]),
            GaugeMetricFamily("esperd_mailbox_depth", "Messages that wait for an actor.", labels=["actor"]),
            CounterMetricFamily("esperd_dead_letters", "Messages that could not be delivered.", labels=["reason"]),
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
