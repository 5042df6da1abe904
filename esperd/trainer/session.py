"""A job from its first line to its report: build, grow, export, train the control, compare."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
import torch
from torch import nn

import esperd
from esperd.declarations import resolve
from esperd.errors import ActorUnavailable, CheckpointRejected, InvalidJob, InvalidModel, StoreFailed
from esperd.execution.oplist import load_kernel
from esperd.growth.card import card
from esperd.growth.contribution import Measured
from esperd.growth.export import STRUCTURE, GrowthFile, SampleSpec, encode
from esperd.growth.gates import gate_checks
from esperd.growth.grower import Grower
from esperd.growth.interval import mean_interval
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork
from esperd.growth.optimizer import build_optimizer
from esperd.growth.precision import Precision
from esperd.growth.slots import find_slots
from esperd.messages.card import CARD, is_users_own
from esperd.messages.growth import SlotRecord
from esperd.messages.jobs import Artifact, Budget, Growth, Job
from esperd.messages.reports import Comparison, Report
from esperd.messages.telemetry import AuditMeasured, Body, CheckpointSaved, ExportFailed, TrainingStarted
from esperd.plugins import Plugins
from esperd.store.blobs import Blobs
from esperd.trainer import checkpoint
from esperd.trainer.attribution import attribution_of
from esperd.trainer.budget import resolve_schedule
from esperd.trainer.checkpoint import FinishedGrowth, SessionState
from esperd.trainer.data import check_labels, check_sizes, load_splits
from esperd.trainer.desk import Desk
from esperd.trainer.factories import broken_factories
from esperd.trainer.guard import rollbacks
from esperd.trainer.host import HostFactory
from esperd.trainer.kernel_source import KernelSource
from esperd.trainer.loss import check_output, class_count, resolve_loss, resolve_metric
from esperd.trainer.passes import Stopped
from esperd.trainer.run import Run
from esperd.trainer.runner import runner_of

TRACE_SAMPLES = 4
"""Samples of the batch that slots are traced with."""

UNHURRIED_EPOCHS = 1_000_000_000
"""Longest stay on probation where people approve: no job trains as many epochs."""

log = structlog.get_logger()


def patient_growth(job: Job) -> Growth:
    """How long stages last. A seed that people are asked about is not culled for a timeout while they think."""
    return msgspec.structs.replace(job.growth, probation_epochs=UNHURRIED_EPOCHS) if job.policy.approve else job.growth


@dataclass(frozen=True)
class Outcome:
    """What a finished session leaves."""

    artifacts: tuple[Artifact, ...]
    epoch: int


class Session:
    """Trains one job.

    Args:
        job: with an absolute ``workdir`` that is on ``sys.path``.
        plugins: what is installed.
        desk: the daemon.
        blobs: where artifacts go.
        checkpoints: where checkpoints go; None: beside the artifacts.
        resumed: times this job already went on from a checkpoint.
        pieces: parts in which each batch is trained, to take less memory.
        clock: seconds, monotonic.
        sleep: waits so many seconds.

    Raises:
        EsperError: model, data, slots, loss, metric or export directory do not fit, or a blueprint that the job names does not
            import; each with its own class.
    """

    def __init__(
        self,
        job: Job,
        plugins: Plugins,
        desk: Desk,
        blobs: Blobs,
        *,
        checkpoints: Blobs | None = None,
        resumed: int = 0,
        pieces: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.job = job
        self.plugins = plugins
        self.desk = desk
        self.blobs = blobs
        self.checkpoints = checkpoints or blobs
        self.resumed = resumed
        self.pieces = pieces
        self.clock = clock
        self.sleep = sleep
        self.events: list[Body] = []
        self.chance_loss: float | None = None
        self.finished: FinishedGrowth | None = None
        self._audit_tensors: dict[str, torch.Tensor] = {}
        self._last_checkpoint = clock()
        self.device = _device(job)
        self.export_directory = _export_directory(job)
        if self.export_directory is not None and not resumed:
            _require_writable(self.export_directory)
        torch.set_num_threads(job.threads)
        torch.backends.mha.set_fastpath_enabled(False)  # its products would be hidden from the ledger
        plugins.blueprints.matching(job.growth.blueprints)  # refuses a name that nothing registered
        self.strategy = plugins.strategies[job.policy.strategy]
        self.schedule = resolve_schedule(job.scheduler)
        self.curve = resolve(plugins.alpha_schedules[job.growth.alpha_schedule].curve)
        self.loss, self.metric = resolve_loss(job), resolve_metric(job)
        self.splits = load_splits(job, plugins.datasets)
        check_sizes(self.splits)
        self.hosts = HostFactory(job, plugins, self.device)
        host = self.hosts.build()
        self.slots = self._find_slots(host)
        self.broken = broken_factories(plugins, job.growth.blueprints, {slot.topology for slot in self.slots})
        self._check(host)
        self.host_flops_per_sample = self.hosts.flops(host, self._batch(TRACE_SAMPLES)[0])
        self._first_host: nn.Module | None = host

    # --- building --------------------------------------------------------------------------------------------------------

    def _batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.arange(min(count, self.splits.train.samples))
        inputs, targets = self.splits.train.batch(indices)
        return inputs.to(self.device), targets.to(self.device)

    def _find_slots(self, host: nn.Module) -> tuple[SlotRecord, ...]:
        if not self.job.growth.enabled:
            return ()
        inputs, _ = self._batch(TRACE_SAMPLES)
        return find_slots(host, inputs, patterns=self.job.slots.patterns, limit=self.job.slots.limit)

    def _check(self, host: nn.Module) -> None:
        """One pass that leaves no trace: output, loss, metric and labels fit each other."""
        inputs, targets = self._batch(TRACE_SAMPLES)
        output = self.hosts.output(host, inputs)
        if output.is_floating_point():
            output.requires_grad_()  # so that a loss which cuts the gradient shows
        check_output(self.loss, output, targets, self.metric)
        classes = class_count(self.loss, output)
        if classes is not None:
            check_labels(self.splits, classes)
            self.chance_loss = math.log(classes)  # of uniform answers; what a constant can do on skewed labels is lower still

    def _run(self, phase: str, budget: Budget) -> Run:
        """A run at its very beginning. Both phases start from the same weights: the job's ``rng_seed`` decides them."""
        if self._first_host is not None:
            host, self._first_host = self._first_host, None
        else:
            host = self.hosts.build()
        network = GrowingNetwork(host, self.slots if phase == "growth" else ())
        source = KernelSource(self.plugins, self.desk, self.device, self.job.rng_seed, self.sleep, self.broken)
        grower = Grower(
            network=network,
            optimizer=build_optimizer(self.job.optimizer, network.host.parameters()),
            loss=self.loss,
            metric=self.metric,
            growth=patient_growth(self.job),
            settings=self.job.gates,
            gates=gate_checks(self.plugins.gates.values()),
            operations={name: resolve(entry.apply) for name, entry in self.plugins.surgery_operations.items()},
            curve=self.curve,
            source=source,
            ledger=Ledger(),
            emit=self.events.append,
            precision=Precision(self.job.precision, self.device),
            max_gradient_norm=self.job.optimizer.max_gradient_norm,
            runner=runner_of(self.job, self.device, self.events.append, lambda: grower.epoch),
        )
        return Run(
            phase=phase,
            job=self.job,
            budget=budget,
            grower=grower,
            splits=self.splits,
            desk=self.desk,
            source=source,
            plugins=self.plugins,
            schedule=self.schedule,
            chance_loss=self.chance_loss,
            traced_flops=self.host_flops_per_sample,
            device=self.device,
            events=self.events,
            pieces=self.pieces,
            epoch_ended=self._epoch_ended,
            step_ended=self._step_ended,
            clock=self.clock,
        )

    # --- the job ---------------------------------------------------------------------------------------------------------

    def train(self, resume_from: str | None = None) -> Outcome:
        """Do the job, or what is left of it.

        Args:
            resume_from: SHA-256 of a checkpoint.

        Raises:
            Stopped: the daemon asked for it; a checkpoint was written unless the job was cancelled.
            TrainingDiverged: a loss became NaN or infinite.
            CheckpointRejected: the checkpoint is of another job, other data or another format.
        """
        run = self._run("growth", self.job.budget)
        if resume_from is not None:
            run = self._resume(run, resume_from)
        self._announce(run)
        try:
            if run.phase == "growth":
                run.train()
                self._finish_growth(run)
                if self.job.control:
                    run = self._run("control", self._control_budget())
                    self._checkpoint(run)
            if run.phase == "control":
                run.train()
                return self._conclude(run)
            return self._conclude(None)
        except Stopped as stopped:
            if stopped.why != "cancel" and stopped.between_steps:
                self._checkpoint(run)
            elif stopped.why != "cancel":
                self.events.clear()  # of a decision point that is come to again, and told then
            self._flush()
            raise

    def _control_budget(self) -> Budget:
        """As many FLOPs as growth took. None at all when the budget was spent before the first step: the control is then measured
        as it is, and the report's verdict says that nothing was trained.
        """
        assert self.finished is not None  # noqa: S101 - the control starts after growth has finished
        return Budget(flops=self.finished.metrics.training_flops)

    def _announce(self, run: Run) -> None:
        because = self.splits.inexact_because
        if not because and self.job.budget.seconds is not None:
            because = "the budget is bounded by seconds"
        if not because and self.job.threads > 1:
            because = "threads > 1: sums over threads may differ in their last bits"
        if not because and self.device.type != "cpu":
            because = "some CUDA operations are not deterministic"
        if not because and self.job.compile:
            because = "compile = true: a checkpoint does not hold what was compiled, and compiled sums may round otherwise"
        if not because and self.job.policy.rent_seconds > 0.0:
            because = "policy.rent_seconds is above 0: decisions depend on measured seconds"
        if not because and self.job.policy.min_free_memory > 0.0:
            because = "policy.min_free_memory is above 0: decisions depend on what else the machine holds"
        if not because and self.pieces > 1:
            because = f"memory ran out: each batch is trained in {self.pieces} pieces"
        if not because:
            because = self._fault_met(run)
        self.events.append(
            TrainingStarted(
                epoch=self._epoch(run),
                epochs=self.job.budget.epochs,
                train_samples=self.splits.train.samples,
                gate_samples=self.splits.gate.samples,
                audit_samples=self.splits.audit.samples,
                host_parameters=run.grower.host_parameters,
                host_flops_per_sample=self.host_flops_per_sample,
                slots=self.slots,
                device=str(self.device),
                exact_resume=not because,
                inexact_because=because,
            )
        )
        self._flush()

    def _fault_met(self, run: Run) -> str:
        """What the daemon could not do for this job before it was resumed, and would have done in another run; empty: nothing."""
        growth = self.finished.run if self.finished is not None else run.points
        for refused in growth.refused:
            if refused.by == "unavailable":
                return f"the kernel of {refused.blueprint} at {refused.slot} could not be provided at epoch {refused.epoch}"
        if growth.policy_unavailable:
            return f"the policy could not be reached at {growth.policy_unavailable} decision points"
        return ""

    def _epoch(self, run: Run) -> int:
        """Epochs of the growth run: the job's own count. The control does more of them, for the same FLOPs."""
        return self.finished.run.grower.epoch if self.finished is not None else run.grower.epoch

    def _finish_growth(self, run: Run) -> None:
        """Attribute the gate loss to the kept seeds, read the audit split, and put the network into the store."""
        attribution = attribution_of(run)
        measured, metrics = run.audit()
        self.events.append(AuditMeasured(network="grown", metrics=metrics))
        self._audit_tensors = {"audit.loss": measured.loss}
        if measured.metric is not None:
            self._audit_tensors["audit.metric"] = measured.metric
        weights, structure = encode(
            run.grower.network,
            host=self.hosts.reference,
            sample=SampleSpec.of(self._batch(1)[0]),
            history=tuple(run.grower.outcomes),
            manifest={
                "job": self.desk.job_id,
                "name": self.job.name,
                "rng_seed": self.job.rng_seed,
                "job_sha256": job_digest(self.job),
                "data": self.job.data,
                "data_sha256": self.splits.fingerprint,
                "audit_loss": metrics.loss,
                "audit_metric": metrics.metric,
                **({"evidence_sha256": run.points.evidence.sha256} if run.points.evidence is not None else {}),
            },
            version=esperd.__version__,
        )
        artifacts = (self._keep("model.safetensors", weights), self._keep("growth.json", structure))
        state, _ = run.state()
        ended = msgspec.structs.replace(state, point=None)  # nothing is gone back to any more
        self.finished = FinishedGrowth(metrics=metrics, artifacts=artifacts, run=ended, attribution=attribution)

    def _conclude(self, control: Run | None) -> Outcome:
        """Compare with the control, write the report, export."""
        assert self.finished is not None  # noqa: S101 - both callers come after growth has finished
        comparison, control_metrics = None, None
        if control is not None:
            measured, control_metrics = control.audit()
            self.events.append(AuditMeasured(network="control", metrics=control_metrics))
            comparison = self._compare(measured)
        grown = self.finished.run
        report = Report(
            job=self.desk.job_id,
            name=self.job.name,
            rng_seed=self.job.rng_seed,
            metric_name=self.metric.name if self.metric else None,
            grown=self.finished.metrics,
            control=control_metrics,
            comparison=comparison,
            seeds=grown.grower.outcomes,
            refused=grown.refused,
            slots=self.slots,
            flops=grown.grower.spent,
            policy_unavailable=grown.policy_unavailable,
            device=str(self.device),
            torch=str(torch.__version__),
            esperd=esperd.__version__,
            resumed=self.resumed,
            attribution=self.finished.attribution,
            rollbacks=(
                *rollbacks("growth", grown.watch),
                *(rollbacks("control", control.guard.watch) if control is not None else ()),
            ),
            evidence=grown.evidence,
        )
        text = msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=2)
        (structure,) = [artifact for artifact in self.finished.artifacts if artifact.name == STRUCTURE]
        told = card(msgspec.json.decode(self.blobs.get(structure.sha256), type=GrowthFile), report)
        artifacts = (*self.finished.artifacts, self._keep("report.json", text), self._keep(CARD, told.encode()))
        if self.export_directory is not None:
            self._copy_out(self.export_directory, artifacts)
        self._flush()
        return Outcome(artifacts=artifacts, epoch=grown.grower.epoch)

    def _compare(self, control: Measured) -> Comparison:
        """Grown network against control, paired by audit sample."""
        confidence = self.job.gates.confidence
        loss = mean_interval(control.loss - self._audit_tensors["audit.loss"], confidence)
        metric: tuple[float | None, float | None, float | None] = (None, None, None)
        if control.metric is not None:
            metric = mean_interval(self._audit_tensors["audit.metric"] - control.metric, confidence)
        return Comparison(
            metric=metric[0],
            metric_lower=metric[1],
            metric_upper=metric[2],
            loss=loss[0],
            loss_lower=loss[1],
            loss_upper=loss[2],
            confidence=confidence,
            samples=control.loss.numel(),
        )

    def _keep(self, name: str, data: bytes) -> Artifact:
        return Artifact(name=name, sha256=self.blobs.put(data), size_bytes=len(data))

    def _copy_out(self, directory: Path, artifacts: tuple[Artifact, ...]) -> None:
        """Copy what the store keeps, but over no ``README.md`` of the user's. That the copy failed is told, and takes nothing
        from a job that did its work.
        """
        files = [(artifact.name, self.blobs.get(artifact.sha256)) for artifact in artifacts]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, data in files:
                path = directory / name
                if name != CARD or not is_users_own(path):
                    path.write_bytes(data)
        except OSError as error:
            self.events.append(ExportFailed(directory=str(directory), reason=str(error)))

    # --- events and checkpoints ------------------------------------------------------------------------------------------

    def _epoch_ended(self, run: Run) -> None:
        self._flush()
        # What the policy is told after a kernel was unavailable must not be heard by a run that knows nothing of it.
        met_fault = any(refused.by == "unavailable" and refused.epoch == run.grower.epoch for refused in run.points.refused)
        if met_fault or self.clock() - self._last_checkpoint >= self.job.checkpoint_every_s:
            self._checkpoint(run)

    def _step_ended(self, run: Run) -> None:
        due = self.clock() - self._last_checkpoint >= self.job.checkpoint_mid_epoch_s
        steps = self.job.checkpoint_every_steps
        if due or (steps and run.grower.step % steps == 0):
            self._checkpoint(run)

    def _flush(self) -> None:
        if self.events:
            self.desk.record(self.events)
            self.events.clear()

    def _checkpoint(self, run: Run) -> None:
        """Take a checkpoint. Where disk or daemon cannot, the job goes on, and would resume from the one before.

        What happened before it is told first: a job that goes on from here does not come by again.
        """
        self._flush()
        began = self.clock()
        state, tensors = run.state()
        session = SessionState(
            format=checkpoint.FORMAT,
            job_digest=job_digest(self.job),
            data_fingerprint=self.splits.fingerprint,
            run=state,
            finished=self.finished,
        )
        data = checkpoint.encode(session, {**tensors, **self._audit_tensors})
        epoch = self._epoch(run)
        try:
            sha256 = self.checkpoints.put(data)
            self.desk.checkpoint_written(sha256, epoch)
        except (ActorUnavailable, StoreFailed) as error:
            log.warning("no checkpoint", job=self.desk.job_id, epoch=epoch, code=error.code, error=str(error))
            return
        finally:
            self._last_checkpoint = self.clock()
        self.events.append(
            CheckpointSaved(epoch=epoch, sha256=sha256, size_bytes=len(data), seconds=self._last_checkpoint - began)
        )
        self._flush()

    def _resume(self, run: Run, sha256: str) -> Run:
        state, tensors, streams = checkpoint.decode(self.checkpoints.get(sha256))
        if state.job_digest != job_digest(self.job):
            raise CheckpointRejected("the checkpoint was written by another job", sha256=sha256)
        if state.data_fingerprint != self.splits.fingerprint:
            raise CheckpointRejected(
                "the data changed since the checkpoint was written; submit the job anew to train on the new data",
                sha256=sha256,
            )
        self.finished = state.finished
        self._audit_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("audit.")}
        if state.run.phase == "control":
            run = self._run("control", self._control_budget())
        run.go_on_from(state.run, tensors, lambda graph: load_kernel(graph.encode(), None))
        checkpoint.restore_rng(streams)
        return run


def job_digest(job: Job) -> str:
    """SHA-256 of a job's canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(job, order="deterministic")).hexdigest()


def _device(job: Job) -> torch.device:
    if job.device == "cuda" and not torch.cuda.is_available():
        raise InvalidModel('device = "cuda", but torch sees no CUDA device here; use device = "cpu"', device=job.device)
    return torch.device(job.device)


def _export_directory(job: Job) -> Path | None:
    return None if job.export.directory is None else Path(job.workdir) / job.export.directory


def _require_writable(directory: Path) -> None:
    """Make the directory and a file in it: what is found wrong here has cost nothing yet.

    Raises:
        InvalidJob: when the operating system refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidJob(
            f"export.directory {directory} cannot be written: {error}; name another one, or none: the model is kept in the"
            " daemon's store either way",
            key="export.directory",
            directory=str(directory),
        ) from error
