"""Seeds as others see them: what is said about one in records, outcomes and evidence."""

from __future__ import annotations

from esperd.growth.network import Seed
from esperd.messages.growth import Screened, SeedRecord
from esperd.messages.reports import SeedOutcome


def record_of(seed: Seed) -> SeedRecord:
    """A seed as it stands."""
    return SeedRecord(
        seed=seed.name,
        slot=seed.record.slot,
        blueprint=seed.blueprint,
        stage=seed.stage,
        alpha=seed.alpha,
        parameters=seed.parameters_added,
        flops_per_sample=seed.flops_per_sample,
        germinated_epoch=seed.epoch,
        epochs_in_stage=seed.life.epochs_in_stage,
        operator=seed.operator_name,
        alpha_target=seed.alpha_target,
        kernel=seed.kernel,
        contribution=seed.contribution,
        prospect=seed.prospect,
        trial=seed.trial,
        gradient_ratio=seed.gradient_ratio,
        verdict=seed.verdict,
        reason=seed.life.reason,
        screening=seed.screening,
        incubation_loss=seed.incubation_loss,
        activation_bytes=seed.activation_bytes,
    )


def screened(seed: Seed) -> Screened:
    """What a candidate had to show when its screening ended."""
    return Screened(
        seed=seed.name,
        slot=seed.record.slot,
        blueprint=seed.blueprint,
        prospect=seed.prospect,
        incubation_loss=seed.incubation_loss,
        gradient_ratio=seed.gradient_ratio,
    )


def outcome_of(seed: Seed, reason: str, epoch: int) -> SeedOutcome:
    """How a seed ended."""
    return SeedOutcome(
        seed=seed.name,
        slot=seed.record.slot,
        blueprint=seed.blueprint,
        stage=seed.stage,
        reason=reason,
        contribution=seed.contribution,
        trial=seed.trial,
        parameters=seed.parameters_added,
        flops_per_sample=seed.flops_per_sample,
        germinated_epoch=seed.epoch,
        ended_epoch=epoch,
        operator=seed.operator_name,
        alpha=seed.alpha,
    )
