"""The decision points of one run: the policy is asked, what it says is carried out, what was refused is remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from esperd.errors import EsperError
from esperd.growth.grower import Grower
from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.jobs import Budget, Job
from esperd.messages.policy import Arm, Conclude, Decide, Decided, Decision, Observation
from esperd.messages.reports import RefusedArm
from esperd.messages.telemetry import Body, DecisionMade, EvidenceGiven, PolicyUnavailable
from esperd.plugins import Plugins
from esperd.trainer.desk import Desk
from esperd.trainer.kernel_source import KernelSource
from esperd.trainer.offers import Offers
from esperd.trainer.passes import TrialSamples
from esperd.trainer.scouting import MOST_ROUNDS, SCOUTING, Scout
from esperd.trainer.stopwatch import seconds_share
from esperd.trainer.unavailable import UNAVAILABLE, UnavailableArms

log = structlog.get_logger()

Observe = Callable[["DecisionPoints"], Observation]
"""What the run shows the policy, with what was offered, refused and measured so far."""


@dataclass
class DecisionPoints:
    """What one run asked, was told, and could not do.

    Args:
        job: what was asked for.
        grower: carries out decisions.
        desk: the daemon, with the policy behind it.
        source: makes seeds, knows which arms exist.
        plugins: blueprints and strategies.
        samples: what arms are measured on.
        budget: what the grown network may have.
        events: takes events as they happen.
        policy_state: what the policy wants to be shown again; opaque.
        heard: the decision point whose answer that is of; 0: of none yet; None: an older esperd did not keep it.
        refused: arms that could not be grown, the latest reason of each party.
        policy_unavailable: times the policy did not answer.
        unavailable: arms whose kernel could not be provided.
        asked: times the policy was asked. It never goes back, not even with the network: an answer belongs to one question.
        evidence: what the policy was given of other jobs' experience; None: nothing.
    """

    job: Job
    grower: Grower
    desk: Desk
    source: KernelSource
    plugins: Plugins
    samples: TrialSamples
    budget: Budget
    events: list[Body]
    policy_state: bytes = b""
    heard: int | None = 0
    refused: list[RefusedArm] = field(default_factory=list)
    policy_unavailable: int = 0
    unavailable: UnavailableArms = field(default_factory=UnavailableArms)
    asked: int = 0
    evidence: EvidenceSnapshot | None = None
    scout: Scout | None = None
    """Of the decision point at hand; None: nothing was measured for it."""
    offers: Offers = field(init=False)
    """Arms with their prices."""

    def __post_init__(self) -> None:
        self.offers = Offers(self.grower, self.source, self.plugins, self.job, self.budget, self._formula_failed)

    def decide(self, observe: Observe) -> None:
        """Ask the policy, carry out what it says, remember what was refused."""
        self.scout = None
        for _ in range(MOST_ROUNDS):
            decided = self._ask(observe)
            if decided is None:
                return
            asked = [decision for decision in decided.decisions if decision.action in SCOUTING]
            for decision in decided.decisions:
                if decision.action not in SCOUTING:
                    self._carry_out(decision)
            if not asked:
                return
            self._go_scouting(asked)
        reason = f"the policy asked for measurements {MOST_ROUNDS} times at one decision point and decided nothing"
        self.events.append(PolicyUnavailable(epoch=self.grower.epoch, reason=reason))

    def _ask(self, observe: Observe) -> Decided | None:
        """Ask the policy; None when it cannot be reached."""
        self.asked += 1
        request = Decide(
            job=self.desk.job_id,
            point=self.asked,
            rng_seed=self.job.rng_seed,
            settings=self.job.policy,
            observation=observe(self),
            state=self.policy_state,
            heard=self.heard,
        )
        try:
            decided = self.desk.decide(request)
        except EsperError as error:
            self.policy_unavailable += 1
            self.events.append(PolicyUnavailable(epoch=self.grower.epoch, reason=f"{error.code}: {error}"))
            return None
        self.policy_state, self.heard = decided.state, self.asked
        self.grower.screened_out.clear()
        if decided.evidence is not None and decided.evidence != self.evidence:
            self.evidence = decided.evidence
            self.events.append(EvidenceGiven(epoch=self.grower.epoch, evidence=decided.evidence))
        return decided

    def _go_scouting(self, asked: list[Decision]) -> None:
        """Measure what the policy wants to know of arms; it is asked again with what was found."""
        self.scout = Scout(self.grower, self.samples)
        refused = self.scout.measure(asked)
        self.events.extend(self.scout.events)
        epoch, point = self.grower.epoch, self.asked
        self.events.extend(
            DecisionMade(epoch=epoch, decision=decision, applied=False, refusal=reason, point=point)
            for decision, reason in refused
        )

    def conclude(self) -> None:
        """Tell the policy of the seeds that its last decisions kept or culled. Where it cannot be told, later jobs know less."""
        if not self.asked:
            return
        seeds = tuple(self.grower.outcomes)
        ending = Conclude(job=self.desk.job_id, point=self.asked, epoch=self.grower.epoch, seeds=seeds)
        try:
            self.desk.conclude(ending)
        except EsperError as error:
            log.warning("the last seeds were not recorded", job=self.desk.job_id, code=error.code, error=str(error))

    def _carry_out(self, decision: Decision) -> None:
        refusal, by = "", "gate"
        if decision.action == "wait":
            if decision.arm is not None and not decision.proposes:
                self._refuse(decision.arm, "policy", decision.reason)
        else:
            # What a plugin's blueprint, a missing kernel or a stale decision does wrong refuses this decision; training goes on.
            try:
                refusal = self._too_large(decision) or self.grower.apply(decision) or ""
            except EsperError as error:
                refusal = f"{error.code}: {error}"
                by = "unavailable" if isinstance(error, UNAVAILABLE) else "gate"
            if decision.arm is not None:
                self._settle(decision.arm, by, refusal)
                if decision.action == "germinate" and not refusal:  # nothing else has a seed of this arm come to live
                    self._time(decision.arm)
        self.events.extend(self.source.loaded)
        self.source.loaded.clear()
        made = DecisionMade(
            epoch=self.grower.epoch,
            decision=decision,
            applied=not refusal,
            refusal=refusal,
            point=self.asked,
        )
        self.events.append(made)

    def _too_large(self, decision: Decision) -> str:
        """Why a seed would break a hard limit of the budget; empty when it would not. People and strategies of plugins may ask
        for what was not offered, and what is approved may have been offered before another seed was grown.
        """
        if decision.action != "germinate" or decision.arm is None:
            return ""
        slot = self.grower.network.port(decision.arm.slot).record
        price = self.offers.price(decision.arm, self.plugins.blueprints[decision.arm.blueprint], slot)
        return "" if price is None else self.offers.over_budget(*price, decision.screening)

    def _settle(self, arm: Arm, by: str, refusal: str) -> None:
        """Remember how a germination went: what the daemon could not provide is no fault of the arm."""
        if by == "unavailable":
            self.unavailable.failed(arm, self.grower.epoch)
        else:
            self.unavailable.settled(arm)
        if refusal:
            self._refuse(arm, by, refusal)

    def _time(self, arm: Arm) -> None:
        """Measure how long a seed of this arm takes, where the job charges for it and one has come to live."""
        if self.job.policy.rent_seconds == 0.0:
            return
        for seed in self.grower.network.port(arm.slot):
            if seed.blueprint == arm.blueprint and seed.lives and (share := seconds_share(self.grower, seed)) is not None:
                self.offers.seconds_shares[arm] = share

    def _refuse(self, arm: Arm, by: str, reason: str) -> None:
        """Remember a refusal; the same arm refused again by the same party keeps its latest reason only."""
        self.refused = [r for r in self.refused if (r.slot, r.blueprint, r.by) != (arm.slot, arm.blueprint, by)]
        self.refused.append(RefusedArm(slot=arm.slot, blueprint=arm.blueprint, epoch=self.grower.epoch, by=by, reason=reason))

    def _formula_failed(self, arm: Arm, reason: str) -> None:
        if not any((told.slot, told.blueprint, told.reason) == (arm.slot, arm.blueprint, reason) for told in self.refused):
            self._refuse(arm, "gate", reason)

    def refuse_broken(self) -> None:
        """Tell, once, of the arms that cannot be grown in this job because their blueprint does not import."""
        for slot in self.grower.network.slots:
            for blueprint, reason in self.source.broken.items():
                if not self.source.unfit(blueprint, slot):
                    self._refuse(Arm(slot=slot.slot, blueprint=blueprint), "gate", reason)
