"""What a policy asks to be measured of arms before it grows one: gradient merits and contests. The network stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from esperd.errors import EsperError
from esperd.growth.candidate import NotGrown
from esperd.growth.contest import contest
from esperd.growth.grower import Grower, TrialBatches
from esperd.growth.merit import gradient_merit
from esperd.messages.policy import Arm, ArmMerit, ArmTrial, Decision
from esperd.messages.telemetry import ArmGauged, ArmTried, Body

SCOUTING = ("gauge", "try")
"""Actions that measure and change nothing."""

MOST_ROUNDS = 16
"""How often a policy may ask for measurements at one decision point. A contest of 8 arms takes 4; a policy that never comes to a
decision must not stop the job. Chosen, not measured."""


@dataclass
class Scout:
    """Measures what one answer of the policy asks for.

    Args:
        grower: in training mode between two steps; is charged.
        batches: what is trained on, and judged by.
    """

    grower: Grower
    batches: TrialBatches
    merits: list[ArmMerit] = field(default_factory=list)
    trials: list[ArmTrial] = field(default_factory=list)
    events: list[Body] = field(default_factory=list)

    def measure(self, decisions: Iterable[Decision]) -> list[tuple[Decision, str]]:
        """Measure everything that is asked for.

        Args:
            decisions: to ``gauge`` or ``try``.

        Returns:
            Decisions that could not be carried out, each with the reason: it names no arm, or no length.
        """
        refused, rounds = [], dict[float, list[Arm]]()
        for decision in decisions:
            problem = _problem(decision)
            if problem:
                refused.append((decision, problem))
            elif decision.arm is not None and decision.batches is not None and decision.action == "gauge":
                self._gauge(decision.arm, decision.batches)
            elif decision.arm is not None and decision.epochs is not None:
                rounds.setdefault(decision.epochs, []).append(decision.arm)
        for epochs, arms in rounds.items():
            self._try(arms, epochs)
        return refused

    def _gauge(self, arm: Arm, batches: int) -> None:
        epoch, norm, why_not = self.grower.epoch, None, ""
        try:
            norm = gradient_merit(self.grower, arm, lambda: self.batches.train(epoch), batches=batches)
        except NotGrown as refusal:
            why_not = str(refusal)
        except EsperError as error:  # the network cannot be copied, or there is no such slot
            why_not = f"{error.code}: {error}"
        if norm is not None and not math.isfinite(norm):
            norm, why_not = None, f"its gradient is {norm}"
        merit = ArmMerit(arm=arm, norm=norm, batches=batches, epoch=epoch, why_not=why_not)
        self.merits.append(merit)
        self.events.append(ArmGauged(epoch=epoch, merit=merit))

    def _try(self, arms: Sequence[Arm], epochs: float) -> None:
        epoch = self.grower.epoch
        waiting = dict.fromkeys(arms)
        try:
            for contender in contest(self.grower, arms, lambda: self.batches.train(epoch), self.batches.gate, epochs=epochs):
                waiting.pop(contender.arm, None)
                self._tell(
                    ArmTrial(arm=contender.arm, epochs=epochs, trial=contender.trial, epoch=epoch, why_not=contender.why_not)
                )
        except EsperError as error:
            for arm in waiting:
                self._tell(ArmTrial(arm=arm, epochs=epochs, trial=None, epoch=epoch, why_not=f"{error.code}: {error}"))

    def _tell(self, tried: ArmTrial) -> None:
        self.trials.append(tried)
        self.events.append(ArmTried(epoch=self.grower.epoch, tried=tried))


def _problem(decision: Decision) -> str:
    """Why a decision to measure cannot be carried out; empty when it can."""
    if decision.arm is None:
        return f"a decision to {decision.action} must name an arm"
    if decision.action == "gauge" and (decision.batches is None or decision.batches < 1):
        return f"a decision to gauge must say over how many batches, at least one, not {decision.batches}"
    if decision.action == "try" and (decision.epochs is None or not 0.0 < decision.epochs < float("inf")):
        return f"a decision to try must say for how many epochs, a number above 0, not {decision.epochs}"
    return ""
