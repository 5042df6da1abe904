"""The built-in surgery operations. Each completes, or says why it refused, or raises and leaves the network as it was."""

from __future__ import annotations

from esperd.errors import BlueprintRejected, IllegalTransition, NotTraining
from esperd.growth.grower import Grower
from esperd.growth.lifecycle import (
    RESTING_AT_TARGET,
    CullRequested,
    FossilizeRequested,
    Germinate,
    Placed,
    RetargetRequested,
)
from esperd.growth.network import Seed
from esperd.growth.newborn import newborn
from esperd.growth.probe import probe
from esperd.growth.trial import controlled_trial
from esperd.messages.growth import Stage
from esperd.messages.policy import Decision
from esperd.messages.telemetry import TrialMeasured


def germinate(grower: Grower, decision: Decision) -> str | None:
    """Grow a seed of the decision's arm: gate G0, placed at its slot, probed for gate G1, then it incubates.

    Returns:
        None when it incubates; otherwise what gate G0 or G1 had against it.

    Raises:
        IllegalTransition: when the decision names no arm, or no batch was seen yet to probe the seed with.
        NotTraining: when the network is in eval mode.
        BlueprintRejected: when the seed raises as it is probed; it is culled.
    """
    if decision.arm is None:
        raise IllegalTransition("a decision to germinate must name an arm", action=decision.action)
    if grower.sample is None:
        raise IllegalTransition("a seed can only germinate once a batch was seen", slot=decision.arm.slot)
    if not grower.network.training:
        raise NotTraining("a seed can only germinate in a network in training mode; call network.train() first")
    network, record = grower.network, grower.network.port(decision.arm.slot).record
    unfit = grower.source.unfit(decision.arm.blueprint, record)
    if unfit:
        return unfit
    seed = newborn(grower, decision.arm)
    seed.screening = decision.screening
    refusal = grower.occur(seed, Germinate())
    if refusal:
        return refusal
    network.germinated += 1
    network.insert(seed)
    inputs, targets = grower.sample
    try:
        shown = grower.ledger.charge(
            "incubation",
            f"probe:{seed.name}",
            len(inputs),
            lambda: probe(network, seed, inputs, targets, grower.loss, alpha=seed.alpha_target),
        )
    except Exception as error:
        problem = f"its probe raised {type(error).__name__}: {error}"
        grower.occur(seed, CullRequested(problem))
        raise BlueprintRejected(
            f"seed {seed.name} of blueprint {seed.blueprint!r} was culled: {problem}", seed=seed.name
        ) from error
    seed.activation_bytes = shown.activation_bytes
    grower.occur(seed, Placed(), probe=shown)
    return None if seed.stage is Stage.TRAINING else seed.life.reason


def fossilize(grower: Grower, decision: Decision) -> str | None:
    """Make a probationary seed permanent, if gate G5 agrees. Where the proof is a controlled trial, it is run first."""
    seed = _seed(grower, decision)
    fresh = seed.trial is not None and seed.trial.epoch == grower.epoch
    if grower.settings.proof == "trial" and seed.stage is Stage.PROBATIONARY and not fresh:
        _run_trial(grower, seed)
    return grower.occur(seed, FossilizeRequested(decision.reason))


def cull(grower: Grower, decision: Decision) -> str | None:
    """Remove a living seed; its slot cools down."""
    grower.occur(_seed(grower, decision), CullRequested(decision.reason))
    return None


def trial(grower: Grower, decision: Decision) -> str | None:
    """Measure what a seed brings by a controlled trial. The network does not move; the seed's record holds what was found.

    Raises:
        IllegalTransition: the seed is not heard, or the grower was given no batches for trials.
        TrainingDiverged: one of the twins did.
    """
    _run_trial(grower, _seed(grower, decision))
    return None


def _run_trial(grower: Grower, seed: Seed) -> None:
    if grower.batches is None:
        raise IllegalTransition("this grower has no batches to run a trial with; give it some as Grower.batches", seed=seed.name)
    batches, epoch = grower.batches, grower.epoch
    steps = max(1, round(grower.settings.trial_epochs * grower.steps_per_epoch))
    seed.trial = controlled_trial(grower, seed.name, lambda: batches.train(epoch), batches.gate, steps=steps)
    grower.emit(TrialMeasured(epoch=epoch, seed=seed.name, trial=seed.trial))


def set_alpha(grower: Grower, decision: Decision) -> str | None:
    """Give a seed that rests at its target alpha another one. 0 is its scheduled removal: it fades out, then it is culled.

    Raises:
        IllegalTransition: when the decision names no alpha, or one outside 0 to 1, or the seed does not rest at its target.
    """
    seed = _seed(grower, decision)
    if decision.alpha is None or not 0.0 <= decision.alpha <= 1.0:
        raise IllegalTransition(f"alpha must be given from 0 to 1, not {decision.alpha}", action=decision.action, seed=seed.name)
    if decision.alpha == seed.alpha_target:
        return f"the alpha of {seed.name} is {decision.alpha:g} already"
    if seed.stage not in RESTING_AT_TARGET:
        raise IllegalTransition(
            f"{seed.name} is {seed.stage}; its alpha can be changed when it rests at its target", seed=seed.name
        )
    seed.alpha_target = decision.alpha
    return grower.occur(seed, RetargetRequested(decision.alpha, decision.reason))


def _seed(grower: Grower, decision: Decision) -> Seed:
    if decision.seed is None:
        raise IllegalTransition(f"a decision to {decision.action} must name a seed", action=decision.action)
    return grower.network.seed(decision.seed)
