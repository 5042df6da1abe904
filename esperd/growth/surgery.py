"""The built-in surgery operations. Each completes, or says why it refused, or raises and leaves the network as it was."""

from __future__ import annotations

from esperd.errors import BlueprintRejected, IllegalTransition
from esperd.growth.grower import Grower
from esperd.growth.incubation import probe
from esperd.growth.lifecycle import CullRequested, FossilizeRequested, Germinate, Placed
from esperd.growth.network import Seed
from esperd.messages.growth import Stage
from esperd.messages.policy import Decision


def germinate(grower: Grower, decision: Decision) -> str | None:
    """Grow a seed of the decision's arm: gate G0, placed at its slot, probed for gate G1, then it incubates.

    Returns:
        None when it incubates; otherwise what gate G0 or G1 had against it.

    Raises:
        IllegalTransition: when the decision names no arm, or no batch was seen yet to probe the seed with.
        BlueprintRejected: when the seed raises as it is probed; it is culled.
    """
    if decision.arm is None:
        raise IllegalTransition("a decision to germinate must name an arm", action=decision.action)
    if grower.sample is None:
        raise IllegalTransition("a seed can only germinate once a batch was seen", slot=decision.arm.slot)
    network, record = grower.network, grower.network.port(decision.arm.slot).record
    name = f"{record.slot}#{network.germinated}"
    unfit = grower.nursery.unfit(decision.arm.blueprint, record)
    if unfit:
        return unfit
    grown = grower.nursery.grow(decision.arm.blueprint, record, name, grower.epoch)
    seed = Seed(
        name=name,
        blueprint=decision.arm.blueprint,
        module=grown.module,
        record=record,
        parameters_added=grown.parameters,
        flops_per_sample=grown.flops_per_sample,
        epoch=grower.epoch,
        kernel=grown.kernel,
        graph=grown.graph,
    )
    refusal = grower.occur(seed, Germinate())
    if refusal:
        return refusal
    network.germinated += 1
    network.insert(seed)
    inputs, targets = grower.sample
    try:
        shown = grower.ledger.charge(
            "incubation",
            f"probe:{name}",
            len(inputs),
            lambda: probe(network, seed, inputs, targets, grower.loss, alpha=grower.growth.alpha_target),
        )
    except Exception as error:
        problem = f"its probe raised {type(error).__name__}: {error}"
        grower.occur(seed, CullRequested(problem))
        raise BlueprintRejected(f"seed {name} of blueprint {seed.blueprint!r} was culled: {problem}", seed=name) from error
    grower.occur(seed, Placed(), probe=shown)
    return None if seed.stage is Stage.TRAINING else seed.life.reason


def fossilize(grower: Grower, decision: Decision) -> str | None:
    """Make a probationary seed permanent, if gate G5 agrees."""
    seed = _seed(grower, decision)
    return grower.occur(seed, FossilizeRequested(decision.reason))


def cull(grower: Grower, decision: Decision) -> str | None:
    """Remove a living seed; its slot cools down."""
    grower.occur(_seed(grower, decision), CullRequested(decision.reason))
    return None


def _seed(grower: Grower, decision: Decision) -> Seed:
    if decision.seed is None:
        raise IllegalTransition(f"a decision to {decision.action} must name a seed", action=decision.action)
    return grower.network.seed(decision.seed)
