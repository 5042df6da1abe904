"""One plain line per notable event, for logs and pipes."""

from __future__ import annotations

from esperd.cli.job_view import slots_line
from esperd.messages.policy import ArmTrial
from esperd.messages.telemetry import (
    ArmTried,
    AuditMeasured,
    ContributionMeasured,
    DecisionMade,
    EpochCompleted,
    Event,
    EvidenceGiven,
    ExportFailed,
    GateEvaluated,
    JobStateChanged,
    KernelLoaded,
    NetworkCompiled,
    NetworkNotCompiled,
    PolicyUnavailable,
    ProspectMeasured,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrainingStarted,
    TrialMeasured,
)
from esperd.report import numbers
from esperd.report.attribution import effect
from esperd.report.decisions import say_decision, say_evidence, say_rollback


def describe(event: Event, metric_name: str | None = None) -> str | None:
    """Say what happened in one line; None for what only programs care about (checkpoints, gates that passed).

    Args:
        event: what happened.
        metric_name: what the job's metric is called.
    """
    match event.body:
        case JobStateChanged() as body:
            reason = f": {body.error.message}" if body.error else ""
            return f"job        {body.state}, attempt {body.attempt}{reason}"
        case TrainingStarted() as body:
            return _training(body)
        case EpochCompleted() as body:
            return _epoch(body, metric_name)
        case DecisionMade() as body:
            return _decision(body)
        case StageChanged() as body:
            return f"stage      {body.seed} ({body.blueprint}) {body.before} -> {body.after}: {body.reason}"
        case GateEvaluated() as body if not body.verdict.passed:
            return f"gate       {body.verdict.gate} holds {body.seed} back: {body.verdict.reason}"
        case ContributionMeasured() | ProspectMeasured() | TrialMeasured() as body:
            return _measured(body)
        case ScreeningEnded() | ArmTried() as body:
            return _competed(body)
        case RolledBack() as body:
            return f"rolledback {say_rollback(body)}"
        case KernelLoaded() | NetworkCompiled() | NetworkNotCompiled() as body:
            return _runs_on(body)
        case PolicyUnavailable() | EvidenceGiven() as body:
            return _policy(body)
        case AuditMeasured() as body:
            measured = body.metrics
            score = f", {metric_name} {numbers.metric(measured.metric, metric_name)}" if measured.metric is not None else ""
            return (
                f"audit      {body.network}: loss {numbers.loss(measured.loss)}{score}, "
                f"{numbers.count(measured.parameters)} parameters"
            )
        case ExportFailed() as body:
            return (
                f"export     {body.directory} could not be written: {body.reason}; `esper export {event.job}` writes it elsewhere"
            )
        case _:
            return None


def _training(body: TrainingStarted) -> str:
    start = f"from epoch {body.epoch}" if body.epoch else "starts"
    until = f", {body.epochs} epochs" if body.epochs is not None else ""
    exact = "" if body.exact_resume else f"; resume is not bit-identical: {body.inexact_because}"
    return (
        f"training   {start}{until} on {body.device}; samples {body.train_samples} train, {body.gate_samples} gate, "
        f"{body.audit_samples} audit; host {numbers.count(body.host_parameters)} parameters; "
        f"slots {slots_line(body.slots) or 'none'}{exact}"
    )


def _epoch(body: EpochCompleted, metric_name: str | None) -> str:
    score = f"  {metric_name} {numbers.metric(body.gate_metric, metric_name)}" if body.gate_metric is not None else ""
    seeds = ", ".join(f"{seed.seed} {seed.stage} {seed.alpha:.2f}" for seed in body.seeds)
    phase = "" if body.phase == "growth" else f" ({body.phase})"
    return (
        f"epoch {body.epoch:4d}{phase}  {body.progress:4.0%}  train {numbers.loss(body.train_loss)}  "
        f"gate {numbers.loss(body.gate_loss)}{score}  lr {body.learning_rate:.2e}  "
        f"{numbers.count(body.parameters)} parameters{f'  [{seeds}]' if seeds else ''}"
    )


def _policy(body: PolicyUnavailable | EvidenceGiven) -> str:
    if isinstance(body, EvidenceGiven):
        return f"policy     decides with {say_evidence(body.evidence)}"
    return f"policy     unavailable at epoch {body.epoch}, training goes on without growing: {body.reason}"


def _measured(body: ContributionMeasured | ProspectMeasured | TrialMeasured) -> str:
    match body:
        case ContributionMeasured():
            return f"measured   {body.seed} contributes {effect(body.contribution)} to the loss"
        case ProspectMeasured():
            return f"measured   {body.seed} switched on would bring {effect(body.prospect)}"
        case TrialMeasured():
            return f"trial      {body.seed} brought {effect(body.trial)} over its twin without it"


def _competed(body: ScreeningEnded | ArmTried) -> str:
    if isinstance(body, ArmTried):
        return _tried(body.tried)
    promised = "; ".join(f"{each.seed} {each.blueprint} {effect(each.prospect)}" for each in body.candidates)
    return f"screening  {body.winner or 'nobody'} goes on of {len(body.candidates)} candidates: {promised}"


def _tried(tried: ArmTrial) -> str:
    arm = f"{tried.arm.blueprint} at {tried.arm.slot}"
    if tried.trial is None:
        return f"contest    {arm} did not compete: {tried.why_not}"
    return f"contest    {arm} brought {effect(tried.trial)} over growing nothing, after {tried.epochs:.2g} epochs at equal FLOPs"


def _runs_on(body: KernelLoaded | NetworkCompiled | NetworkNotCompiled) -> str:
    if isinstance(body, KernelLoaded):
        return f"kernel     {body.blueprint} for {body.seed} from {body.source}, {body.manifest_id[:12]}"
    if isinstance(body, NetworkNotCompiled):
        return f"compiled   not {body.structure}, whose training passes run eager: {body.reason}"
    graphs = "1 graph" if body.graphs == 1 else f"{body.graphs} graphs"
    return f"compiled   {body.structure}: {graphs} in {body.seconds:.1f} s"


def _decision(body: DecisionMade) -> str | None:
    decision = body.decision
    if decision.action == "wait" and decision.arm is None and not decision.proposes and not decision.by:
        return None
    refused = "" if body.applied else f" (refused: {body.refusal})"
    return f"decision   {say_decision(decision)}: {decision.reason}{refused}"
