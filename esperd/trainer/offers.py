"""What the policy may choose from: every arm of a job, with its price and whether it may be grown now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from esperd.declarations import Blueprint
from esperd.growth.grower import Grower
from esperd.growth.network import Seed
from esperd.growth.nursery import screenings
from esperd.growth.operators import operator_flops, operator_parameters
from esperd.messages.growth import SlotRecord
from esperd.messages.jobs import Budget, Job
from esperd.messages.policy import Arm, ArmOption
from esperd.plugins import Plugins
from esperd.trainer.kernel_source import KernelSource
from esperd.trainer.unavailable import UnavailableArms


@dataclass
class Offers:
    """The arms of one run.

    Args:
        grower: the network and its slots.
        source: knows which blueprints fit.
        plugins: blueprints.
        job: names those that may be grown, and the operator.
        budget: what the grown network may have.
        formula_failed: told of an arm that has no price, and why.
        seconds_shares: forward seconds of a seed over the host's, by arm, as far as they were measured.
    """

    grower: Grower
    source: KernelSource
    plugins: Plugins
    job: Job
    budget: Budget
    formula_failed: Callable[[Arm, str], None]
    seconds_shares: dict[Arm, float] = field(default_factory=dict)

    def options(self, unavailable: UnavailableArms) -> Iterator[ArmOption]:
        """Every arm of the job.

        Args:
            unavailable: arms whose kernel could not be provided.
        """
        blueprints = self.plugins.blueprints.matching(self.job.growth.blueprints)
        for slot in self.grower.network.slots:
            taken = self._why_taken(slot)
            for blueprint in blueprints:
                if self.source.unfit(blueprint.name, slot):
                    continue
                arm = Arm(slot=slot.slot, blueprint=blueprint.name)
                price = self.price(arm, blueprint, slot)
                if price is None:
                    continue
                why_not = self.source.broken.get(blueprint.name, "") or taken
                why_not = why_not or unavailable.why_not(arm, self.grower.epoch) or self.over_budget(*price)
                yield ArmOption(
                    arm=arm,
                    parameters=price[0],
                    flops_per_sample=price[1],
                    seconds_share=self.seconds_shares.get(arm),
                    available=not why_not,
                    why_not=why_not,
                )

    def price(self, arm: Arm, blueprint: Blueprint, slot: SlotRecord) -> tuple[int, float] | None:
        """Parameters and FLOPs of an arm, by the formulas of its blueprint. None when they fail: what has no price is not
        offered, and that is told.
        """
        operator = self.job.growth.operator
        try:
            parameters = blueprint.parameters(slot.shape) + operator_parameters(operator, slot)
            flops_per_sample = blueprint.flops(slot.shape) + operator_flops(operator, slot)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin's formula raises costs its own arm
            reason = f"a formula of blueprint {blueprint.name!r} fails for {slot.shape}: {type(error).__name__}: {error}"
            self.formula_failed(arm, reason)
            return None
        return parameters, flops_per_sample

    def over_budget(self, parameters: int, flops_per_sample: float, screening: str = "") -> str:
        """Why a seed of this size does not fit the budget; empty when it does.

        Args:
            parameters: of the seed.
            flops_per_sample: of the seed.
            screening: that it is to be a candidate of: one of them at most goes on, so the others are no part of the network.
        """
        total, most = (
            self.grower.network.effective_parameters - int(self._out(screening, _size)) + parameters,
            self.budget.parameters,
        )
        if most is not None and total > most:
            return f"{total} parameters would exceed the budget's {most}"
        flops = self._grown_flops() - self._out(screening, _flops) + flops_per_sample
        most_flops = self.budget.flops_per_sample
        if most_flops is not None and flops > most_flops:
            return f"{flops:.4g} FLOPs per sample would exceed the budget's {most_flops:.4g}"
        return ""

    def _out(self, screening: str, price: Callable[[Seed], float]) -> float:
        """What candidates cost that will not go on: all of this screening, and of each other one all but the dearest."""
        out = 0.0
        for name, candidates in screenings(self.grower.network.seeds()).items():
            prices = [price(seed) for seed in candidates]
            out += sum(prices) - (0.0 if name == screening else max(prices))
        return out

    def _grown_flops(self) -> float:
        """Forward FLOPs for one sample were every seed in the network heard, as those that still learn may be one day."""
        host = self.grower.ledger.cost("gate", "host") or 0.0
        return host + sum(seed.flops_per_sample for seed in self.grower.network.seeds())

    def _why_taken(self, slot: SlotRecord) -> str:
        for seed in self.grower.network.port(slot.slot):
            if seed.lives:
                return f"the slot holds {seed.name} ({seed.stage})"
        resting = self.grower.resting.get(slot.slot)
        return f"the slot rests after {resting.name} was culled" if resting else ""


def _size(seed: Seed) -> int:
    return sum(parameter.numel() for parameter in seed.parameters())


def _flops(seed: Seed) -> float:
    return seed.flops_per_sample
