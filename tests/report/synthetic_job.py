"""Events and report of a job that never ran: only for tests of what renders them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from esperd.messages.growth import (
    Attribution,
    Contribution,
    Interaction,
    Screened,
    SeedAttribution,
    SeedRecord,
    SlotRecord,
    Stage,
    Trial,
    Verdict,
)
from esperd.messages.jobs import Budget, Job, JobInfo, JobState
from esperd.messages.policy import Alternative, Arm, Decision
from esperd.messages.reports import Comparison, Metrics, RefusedArm, Report, RollbackRecord, SeedOutcome
from esperd.messages.telemetry import (
    AuditMeasured,
    Body,
    CheckpointSaved,
    ContributionMeasured,
    DecisionMade,
    EpochCompleted,
    Event,
    GateEvaluated,
    JobStateChanged,
    KernelLoaded,
    PolicyUnavailable,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrainingStarted,
    TrialMeasured,
)

JOB_ID = "job-01"
EPOCHS = 24
HOST_PARAMETERS = 9_866
HOST_FLOPS = 613_000.0

JOB = Job(
    host="cnn",
    data="digits",
    name="digits <demo>",
    control=True,
    workdir="/tmp",
    budget=Budget(epochs=EPOCHS),
    host_options={"width": 16},
)

SLOTS = (
    SlotRecord(slot="features.3", topology="cnn", shape=(16, 8, 8), dtype="float32", module="ReLU"),
    SlotRecord(slot="features.7", topology="cnn", shape=(32, 4, 4), dtype="float32", module="ReLU"),
)

#: seed, slot, blueprint, parameters, flops, and the epochs at which it enters each stage
LIVES: tuple[tuple[str, str, str, int, float, dict[int, Stage]], ...] = (
    (
        "features.3#1",
        "features.3",
        "conv_residual",
        2_368,
        294_912.0,
        {
            3: Stage.TRAINING,
            6: Stage.BLENDING,
            9: Stage.SHADOWING,
            11: Stage.PROBATIONARY,
            14: Stage.FOSSILIZED,
        },
    ),
    (
        "features.7#1",
        "features.7",
        "depthwise",
        1_376,
        41_472.0,
        {4: Stage.TRAINING, 7: Stage.BLENDING, 10: Stage.SHADOWING, 12: Stage.PROBATIONARY, 15: Stage.CULLED},
    ),
    (
        "features.7#2",
        "features.7",
        "squeeze_excite",
        544,
        1_024.0,
        {18: Stage.TRAINING, 21: Stage.BLENDING},
    ),
)

REASONS = {
    Stage.FOSSILIZED: "contribution +0.0412 [+0.0310, +0.0514] is proven above rent 0.0031",
    Stage.CULLED: "contribution interval [-0.0041, +0.0032] holds 0 after 3 measurements",
}


def stage_at(life: dict[int, Stage], epoch: int) -> Stage | None:
    entered = [stage for at, stage in life.items() if at <= epoch]
    return entered[-1] if entered else None


def contribution(epoch: int, mean: float, half: float) -> Contribution:
    return Contribution(
        loss=mean,
        lower=mean - half,
        upper=mean + half,
        confidence=0.95,
        samples=359,
        metric=mean / 3,
        epoch=epoch,
    )


def measured(seed: str, epoch: int) -> Contribution:
    if seed == "features.3#1":
        return contribution(epoch, 0.018 + 0.003 * (epoch - 6), 0.010)
    return contribution(epoch, 0.002 * math.sin(epoch), 0.0036)


def records(epoch: int) -> tuple[SeedRecord, ...]:
    found = []
    for seed, slot, blueprint, parameters, flops, life in LIVES:
        stage = stage_at(life, epoch)
        if stage is None:
            continue
        blending = next(at for at, entered in life.items() if entered is Stage.BLENDING)
        alpha = min(1.0, max(0.0, (epoch - blending + 1) / 3)) if epoch >= blending else 0.0
        found.append(
            SeedRecord(
                seed=seed,
                slot=slot,
                blueprint=blueprint,
                stage=stage,
                alpha=0.0 if stage is Stage.CULLED else alpha,
                parameters=parameters,
                flops_per_sample=flops,
                germinated_epoch=min(life),
                epochs_in_stage=epoch - max(at for at in life if at <= epoch),
                contribution=measured(seed, epoch) if epoch >= blending else None,
                gradient_ratio=0.4,
            )
        )
    return tuple(found)


def bodies() -> list[Body]:
    told: list[Body] = [
        JobStateChanged(state=JobState.QUEUED, attempt=0),
        JobStateChanged(state=JobState.LEASED, attempt=1),
        JobStateChanged(state=JobState.RUNNING, attempt=1),
        TrainingStarted(
            epoch=0,
            epochs=EPOCHS,
            train_samples=1079,
            gate_samples=359,
            audit_samples=359,
            host_parameters=HOST_PARAMETERS,
            host_flops_per_sample=HOST_FLOPS,
            slots=SLOTS,
            device="cpu",
            exact_resume=True,
        ),
    ]
    charged = 0.0
    for epoch in range(1, EPOCHS + 1):
        told += decisions(epoch) + changes(epoch)
        live = records(epoch)
        kept = [seed for seed in live if seed.stage is not Stage.CULLED]
        for seed in live:
            if seed.contribution is not None and seed.stage is not Stage.CULLED:
                told.append(ContributionMeasured(epoch=epoch, seed=seed.seed, contribution=seed.contribution))
        flops = HOST_FLOPS + sum(seed.flops_per_sample for seed in kept)
        charged += flops * 3 * 1079
        told.append(
            EpochCompleted(
                epoch=epoch,
                phase="growth",
                train_loss=2.2 * math.exp(-epoch / 4) + 0.03,
                gate_loss=2.1 * math.exp(-epoch / 4.5) + 0.09 + 0.012 * math.sin(epoch),
                gate_metric=1 - 0.85 * math.exp(-epoch / 4) - 0.02,
                learning_rate=3e-3 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS)),
                parameters=HOST_PARAMETERS + sum(seed.parameters for seed in kept),
                flops_per_sample=flops,
                training_flops=charged,
                progress=epoch / EPOCHS,
                seconds=0.7,
                seeds=live,
            )
        )
        if epoch % 6 == 0:
            told.append(CheckpointSaved(epoch=epoch, sha256="ab" * 32, size_bytes=123_456, seconds=0.02))
    told.append(AuditMeasured(network="grown", metrics=REPORT.grown))
    for epoch in range(1, EPOCHS + 6):
        told.append(
            EpochCompleted(
                epoch=epoch,
                phase="control",
                train_loss=2.2 * math.exp(-epoch / 4.4) + 0.04,
                gate_loss=2.1 * math.exp(-epoch / 4.9) + 0.12 + 0.012 * math.cos(epoch),
                gate_metric=1 - 0.85 * math.exp(-epoch / 4.4) - 0.03,
                learning_rate=1e-3,
                parameters=HOST_PARAMETERS,
                flops_per_sample=HOST_FLOPS,
                training_flops=HOST_FLOPS * 3 * 1079 * epoch,
                progress=epoch / (EPOCHS + 5),
                seconds=0.4,
                seeds=(),
            )
        )
    told.append(AuditMeasured(network="control", metrics=REPORT.control or REPORT.grown))
    told.append(JobStateChanged(state=JobState.SUCCEEDED, attempt=1))
    return told


def decisions(epoch: int) -> list[Body]:
    told: list[Body] = []
    for seed, slot, blueprint, *_, life in LIVES:
        arm = Arm(slot=slot, blueprint=blueprint)
        if epoch == min(life):
            other = Alternative(arm=Arm(slot="features.3", blueprint="bottleneck"), score=0.011, pulls=1)
            germinate = Decision(
                action="germinate",
                reason="never tried here; bonus 0.0213 above rent 0.0031",
                arm=arm,
                score=0.0182,
                alternatives=(other,),
            )
            told.append(DecisionMade(epoch=epoch, decision=germinate, applied=True))
            told.append(KernelLoaded(epoch=epoch, seed=seed, blueprint=blueprint, manifest_id="c0ffee" * 8, source="disk"))
        if life.get(epoch) in REASONS:
            action = "fossilize" if life[epoch] is Stage.FOSSILIZED else "cull"
            ending = Decision(action=action, reason=REASONS[life[epoch]], seed=seed)
            told.append(DecisionMade(epoch=epoch, decision=ending, applied=True))
    if epoch == 16:
        declined = Decision(
            action="wait",
            reason="score 0.0009 <= rent 0.0124 & nothing better",
            arm=Arm(slot="features.3", blueprint="bottleneck"),
            score=0.0009,
        )
        told.append(DecisionMade(epoch=epoch, decision=declined, applied=True))
        told.append(PolicyUnavailable(epoch=epoch, reason="no answer within 10 s"))
    if epoch == 17:
        refused = Decision(
            action="germinate", reason="second try", arm=Arm(slot="features.7", blueprint="<script>alert(1)</script>")
        )
        told.append(DecisionMade(epoch=epoch, decision=refused, applied=False, refusal="G1: shape changed to (32, 4, 3)"))
    return told


def changes(epoch: int) -> list[Body]:
    told: list[Body] = []
    for seed, slot, blueprint, *_, life in LIVES:
        if epoch not in life:
            continue
        after = life[epoch]
        before = stage_at(life, epoch - 1) or Stage.GERMINATED
        if after is Stage.BLENDING:
            verdict = Verdict(gate="G2", passed=True, reason="ratio 0.41 >= 0.05", numbers={"ratio": 0.41})
            told.append(GateEvaluated(epoch=epoch, seed=seed, verdict=verdict))
        if after is Stage.CULLED:
            verdict = Verdict(gate="G5", passed=False, reason="interval holds 0", numbers={"lower": -0.0041})
            told.append(GateEvaluated(epoch=epoch, seed=seed, verdict=verdict))
        reason = REASONS.get(after, "stayed its epochs")
        told.append(
            StageChanged(epoch=epoch, seed=seed, slot=slot, blueprint=blueprint, before=before, after=after, reason=reason)
        )
    return told


def numbered(told: Sequence[Body]) -> list[Event]:
    return [
        Event(job=JOB_ID, sequence=number, at=1_700_000_000.0 + number * 0.25, body=body)
        for number, body in enumerate(told, start=1)
    ]


def events() -> list[Event]:
    return numbered(bodies())


def info(state: JobState = JobState.RUNNING) -> JobInfo:
    return JobInfo(id=JOB_ID, name=JOB.name, state=state, attempt=1, submitted_at=1_700_000_000.0, job=JOB)


REPORT = Report(
    job=JOB_ID,
    name=JOB.name,
    rng_seed=0,
    metric_name="accuracy",
    grown=Metrics(
        loss=0.0831,
        metric=0.9777,
        parameters=HOST_PARAMETERS + 2_368,
        flops_per_sample=HOST_FLOPS + 294_912,
        training_flops=6.9e10,
        training_seconds=21.4,
        epochs=24,
    ),
    control=Metrics(
        loss=0.1102,
        metric=0.9666,
        parameters=HOST_PARAMETERS,
        flops_per_sample=HOST_FLOPS,
        training_flops=6.9e10,
        training_seconds=15.2,
        epochs=29.3,
    ),
    comparison=Comparison(
        metric=0.0111,
        metric_lower=0.0012,
        metric_upper=0.0223,
        loss=0.0271,
        loss_lower=0.0119,
        loss_upper=0.0423,
        confidence=0.95,
        samples=359,
    ),
    seeds=(
        SeedOutcome(
            seed="features.3#1",
            slot="features.3",
            blueprint="conv_residual",
            stage=Stage.FOSSILIZED,
            reason=REASONS[Stage.FOSSILIZED],
            contribution=contribution(14, 0.0412, 0.0102),
            parameters=2_368,
            flops_per_sample=294_912.0,
            germinated_epoch=3,
            ended_epoch=14,
            operator="add",
            alpha=1.0,
        ),
        SeedOutcome(
            seed="features.7#1",
            slot="features.7",
            blueprint="depthwise",
            stage=Stage.CULLED,
            reason=REASONS[Stage.CULLED],
            contribution=contribution(15, -0.0005, 0.0036),
            parameters=1_376,
            flops_per_sample=41_472.0,
            germinated_epoch=4,
            ended_epoch=15,
            operator="add",
            alpha=0.0,
        ),
        SeedOutcome(
            seed="features.7#2",
            slot="features.7",
            blueprint="squeeze_excite",
            stage=Stage.CULLED,
            reason="the budget ended in blending",
            contribution=None,
            parameters=544,
            flops_per_sample=1_024.0,
            germinated_epoch=18,
            ended_epoch=24,
            operator="add",
            alpha=0.0,
        ),
    ),
    refused=(
        RefusedArm(slot="features.3", blueprint="bottleneck", epoch=16, by="policy", reason="score 0.0009 <= rent 0.0124"),
        RefusedArm(
            slot="features.7",
            blueprint="<script>alert(1)</script>",
            epoch=17,
            by="G1",
            reason="shape changed to (32, 4, 3)",
        ),
    ),
    slots=SLOTS,
    flops={"train": 5.8e10, "incubation": 6.1e9, "ablation": 2.9e9, "gate": 2.0e9},
    policy_unavailable=1,
    device="cpu",
    torch="2.13.0",
    esperd="0.1.0",
    resumed=0,
    rollbacks=(),
)


# --- a job of which everything is known --------------------------------------------------------------------------------------


def trial(epoch: int, mean: float, half: float) -> Trial:
    return Trial(
        loss=mean,
        lower=mean - half,
        upper=mean + half,
        confidence=0.95,
        samples=359,
        steps_with=17,
        steps_without=21,
        flops=3.1e8,
        epoch=epoch,
    )


def kept(seed: str, blueprint: str, operator: str, alpha: float, mean: float, tried: Trial | None) -> SeedOutcome:
    return SeedOutcome(
        seed=seed,
        slot=seed.partition("#")[0],
        blueprint=blueprint,
        stage=Stage.FOSSILIZED,
        reason=REASONS[Stage.FOSSILIZED],
        contribution=contribution(20, mean, 0.012),
        trial=tried,
        parameters=544,
        flops_per_sample=41_472.0,
        germinated_epoch=8,
        ended_epoch=20,
        operator=operator,
        alpha=alpha,
    )


def attributed(seed: str, alpha: float, left_out: float, alone: float, shapley: float) -> SeedAttribution:
    return SeedAttribution(
        seed=seed,
        alpha=alpha,
        leave_one_out=contribution(EPOCHS, left_out, 0.011),
        solo=contribution(EPOCHS, alone, 0.019),
        shapley=shapley,
        shapley_error=0.0,
    )


ATTRIBUTION = Attribution(
    epoch=EPOCHS,
    samples=359,
    loss_all_on=0.0912,
    loss_all_off=0.2431,
    seeds=(
        attributed("features.3#1", 1.0, 0.0412, 0.0790, 0.0601),
        attributed("features.7#3", 1.0, 0.0631, 0.0905, 0.0768),
        attributed("features.7#4", 0.5, -0.0049, 0.0349, 0.0150),
    ),
    interactions=(
        Interaction(first="features.3#1", second="features.7#3", value=0.0212),
        Interaction(first="features.3#1", second="features.7#4", value=-0.0104),
        Interaction(first="features.7#3", second="features.7#4", value=-0.0467),
    ),
    exact=True,
    permutations=0,
    coalitions=8,
    flops=1.3e9,
    not_measured=(),
)

SAMPLED = msgspec.structs.replace(
    ATTRIBUTION,
    seeds=(
        msgspec.structs.replace(ATTRIBUTION.seeds[0], shapley=0.0588, shapley_error=0.0042),
        msgspec.structs.replace(ATTRIBUTION.seeds[1], shapley=0.0781, shapley_error=None),
        msgspec.structs.replace(ATTRIBUTION.seeds[2], solo=None, shapley=None, shapley_error=None),
    ),
    interactions=ATTRIBUTION.interactions[:1],
    exact=False,
    permutations=4,
    coalitions=6,
    not_measured=(
        "features.7#4 alone: the FLOPs cap",
        "features.3#1 with features.7#4: the FLOPs cap",
        "features.7#3 with features.7#4: a loss is not finite",
        "30 of 32 pairs of orders for Shapley values: the FLOPs cap",
    ),
)
"""The same, cut short."""

ROLLED_BACK = RolledBack(
    epoch=17,
    to_epoch=16,
    reason="the training loss 5.31 stands above its limit of 0.412 <twice>",
    numbers={"loss": 5.31, "level": 0.137, "limit": 0.412},
    action="cut_rate",
    rate_scale=0.5,
    trip=1,
)

RICH_REPORT = msgspec.structs.replace(
    REPORT,
    seeds=(
        msgspec.structs.replace(REPORT.seeds[0], trial=trial(13, 0.0108, 0.0061)),
        *REPORT.seeds[1:],
        kept("features.7#3", "conv_light", "gate", 1.0, 0.0702, trial(19, 0.0391, 0.0080)),
        kept("features.7#4", "norm", "multiply", 0.5, 0.0190, None),
    ),
    attribution=ATTRIBUTION,
    rollbacks=(
        RollbackRecord(
            phase="growth",
            trip=1,
            epoch=17,
            to_epoch=16,
            reason=ROLLED_BACK.reason,
            action="cut_rate",
            seeds_culled=0,
            rate_scale=0.5,
        ),
        RollbackRecord(
            phase="control",
            trip=1,
            epoch=3,
            to_epoch=2,
            reason="a loss is not finite",
            action="cut_rate",
            seeds_culled=0,
            rate_scale=0.5,
        ),
    ),
)


def candidate(number: int, blueprint: str, prospect: Contribution | None) -> Screened:
    return Screened(
        seed=f"features.7#{number}",
        slot="features.7",
        blueprint=blueprint,
        prospect=prospect,
        incubation_loss=0.41,
        gradient_ratio=0.3,
    )


SCREENED = ScreeningEnded(
    epoch=8,
    screening="point 7",
    winner="features.7#3",
    candidates=(
        candidate(3, "conv_light", contribution(8, 0.0122, 0.004)),
        candidate(5, "bottleneck", contribution(8, 0.0031, 0.004)),
        candidate(6, "pointwise", None),
    ),
)


def rich_bodies() -> list[Body]:
    """The events of a job, with a screening, a trial, and an epoch that was taken back."""
    told: list[Body] = []
    for body in bodies():
        if isinstance(body, EpochCompleted) and body.phase == "growth" and body.epoch == 17:
            diverged = msgspec.structs.replace(body, train_loss=5.31, gate_loss=4.2)
            told += [diverged, ROLLED_BACK]
        if isinstance(body, EpochCompleted) and body.phase == "growth" and body.epoch == 13:
            told.append(TrialMeasured(epoch=13, seed="features.3#1", trial=trial(13, 0.0108, 0.0061)))
        told.append(body)
        if isinstance(body, EpochCompleted) and body.phase == "growth" and body.epoch == 8:
            told.append(SCREENED)
    return told
