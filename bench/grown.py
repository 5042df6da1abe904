"""Did growing pay? A trained host grown by the default policy against the same host continued, for the same FLOPs, over RNG
seeds.

Protocol: ``bench/PROTOCOL.md``. What is grown, where and when is the default strategy's to decide, on the gate split, with the
    default
gates; everything it tries is charged. One JSON line an arm is appended to ``bench/results/grown.jsonl``; an interrupted bench
goes on where it stopped.
"""

from __future__ import annotations

import copy

import harness
import incubation
import lab
import torch
from torch import nn

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.growth import Grower
from esperd.growth.contribution import Measured
from esperd.growth.lifecycle import shortest_life
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Growth
from esperd.messages.policy import Arm, ArmOption, Decide, Observation, PolicySettings
from esperd.policy import ucb

FULL = {"host_epochs": 40, "extra_host_epochs": 44, "batch_size": 128, "pretrain_rate": 0.1, "rate": 0.1}
QUICK = {"host_epochs": 4, "extra_host_epochs": 10, "batch_size": 64, "pretrain_rate": 0.1, "rate": 0.05}
STAYS = {"incubation_epochs": 1, "blending_epochs": 1, "shadowing_epochs": 1, "probation_epochs": 3, "embargo_epochs": 1}
POLICY = PolicySettings(warmup_epochs=0, latest_germination=0.4, max_live_seeds=2, max_fossilized=2, patience=2)


class Policy:
    """The default strategy, asked in this process as the daemon asks it."""

    def __init__(
        self,
        rng_seed: int,
        plan: dict,
        flops: float,
        settings: PolicySettings = POLICY,
        most_parameters: int | None = None,
    ) -> None:
        self._rng_seed, self._plan, self._flops = rng_seed, plan, flops
        self._settings, self._most_parameters = settings, most_parameters
        self._state = b""
        self._point = 0
        self._gate_losses: list[float] = []
        self.said: list[str] = []

    def __call__(self, grower: Grower, measured: Measured) -> None:
        """One decision point."""
        self._point += 1
        self._gate_losses.append(measured.mean_loss)
        request = Decide(
            job="bench",
            point=self._point,
            rng_seed=self._rng_seed,
            settings=self._settings,
            observation=self._observe(grower, measured),
            state=self._state,
        )
        decided = ucb.decide(request)
        self._state = decided.state
        for decision in decided.decisions:
            if decision.action == "wait":
                continue
            refusal = grower.apply(decision)
            told = f"{decision.arm.blueprint} at {decision.arm.slot}" if decision.arm else decision.seed
            self.said.append(f"epoch {grower.epoch}: {decision.action} {told}{' (refused)' if refusal else ''}")

    def _observe(self, grower: Grower, measured: Measured) -> Observation:
        step = grower.ledger.cost("train", grower.structure()) or 0.0
        epoch_flops = step * grower.steps_per_epoch * self._plan["batch_size"]
        left = (self._flops - grower.ledger.total) / epoch_flops if epoch_flops else None
        return Observation(
            epoch=grower.epoch,
            progress=grower.ledger.total / self._flops,
            epochs_left=left,
            shortest_life_epochs=shortest_life(grower.growth),
            train_loss=measured.mean_loss,
            gate_loss=measured.mean_loss,
            gate_metric=measured.mean_metric,
            gate_losses=tuple(self._gate_losses),
            host_parameters=grower.host_parameters,
            host_flops_per_sample=grower.ledger.cost("gate", "host") or 0.0,
            seeds=grower.records(),
            slots=grower.network.slots,
            options=tuple(self._options(grower)),
        )

    def _options(self, grower: Grower) -> list[ArmOption]:
        options = []
        for slot in grower.network.slots:
            taken = any(seed.lives for seed in grower.network.port(slot.slot)) or slot.slot in grower.resting
            for blueprint in BLUEPRINTS:
                if blueprint.topology != slot.topology:
                    continue
                parameters = blueprint.parameters(slot.shape)
                why_not = "the slot is taken or rests" if taken else self._too_large(grower, parameters)
                options.append(
                    ArmOption(
                        arm=Arm(slot=slot.slot, blueprint=blueprint.name),
                        parameters=parameters,
                        flops_per_sample=blueprint.flops(slot.shape),
                        available=not why_not,
                        why_not=why_not,
                    )
                )
        return options

    def _too_large(self, grower: Grower, parameters: int) -> str:
        total = grower.network.effective_parameters + parameters
        if self._most_parameters is None or total <= self._most_parameters:
            return ""
        return f"{total} parameters would exceed {self._most_parameters}"


def run_arm(data: lab.Data, host: nn.Module, arm: str, rng_seed: int, plan: dict) -> dict[str, object]:
    """The host, grown or continued."""
    grower = lab.grower_of(
        data,
        copy.deepcopy(host),
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=Growth(**STAYS),
        settings=Gates(),
        patterns=("features.stage?",),
        learning_rate=plan["rate"],
    )
    first = grower.measure(lab.in_order(data.gate))
    host_epoch = 3 * grower.ledger.cost("gate", "host") * len(data.train[0])
    flops = plan["extra_host_epochs"] * host_epoch
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    grower.sample = next(iter(lab.batches(data.train, plan["batch_size"], 77)))
    policy = Policy(rng_seed, plan, flops)
    began = lab.clock()
    grower.network.train()
    if arm == "grown":
        policy(grower, first)
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    decide = policy if arm == "grown" else lab.nothing
    lab.train(grower, data, flops=flops, phase=phase, rng_seed=rng_seed, decide=decide)
    grower.close()
    kept = [f"{seed.blueprint} at {seed.record.slot}" for seed in grower.network.seeds() if seed.stage is Stage.FOSSILIZED]
    return {**lab.result(grower, data, lab.clock() - began), "kept": kept, "decisions": policy.said}


def main() -> None:
    """Run what is missing, print, write."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=2)
    data = lab.load(chosen.data)
    plan = QUICK if chosen.quick or data.name == "digits" else FULL
    protocol = {
        "bench": "grown",
        "data": data.name,
        "plan": plan,
        "stays": STAYS,
        "incubation": Growth().incubation,
        "policy": {name: getattr(POLICY, name) for name in POLICY.__struct_fields__},
        "version": 1,
    }
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "grown.jsonl", protocol, keep=not chosen.quick)
    for rng_seed in range(chosen.repeats):
        missing = [arm for arm in ("continued", "grown") if not lines.has(arm=arm, rng_seed=rng_seed)]
        if missing:
            host = incubation.host_of(data, rng_seed, plan)
            for arm in missing:
                lines.add({"arm": arm, "rng_seed": rng_seed, **run_arm(data, host, arm, rng_seed, plan)})
    figures = [
        harness.median_figure(
            f"grown/{figure}",
            [line[figure] for line in lines.of(arm="grown")],
            unit=unit,
            better=better,
            against="continued",
            baseline=[line[figure] for line in lines.of(arm="continued")],
        )
        for figure, unit, better in (("audit_accuracy", "share", "higher"), ("audit_loss", "nats", "lower"))
    ]
    settings = {
        "data": data.name,
        "rng_seeds": chosen.repeats,
        "protocol": lines.digest,
        "incubation": Growth().incubation,
        **plan,
    }
    found = harness.results("grown", figures, quick=chosen.quick, settings=settings)
    print(harness.table(found))
    mean, lower, upper, count = incubation.paired(lines, "grown", "continued", "audit_accuracy")
    kept = [len(line["kept"]) for line in lines.of(arm="grown")]
    print(
        f"\ngrown minus continued at equal FLOPs: {mean:+.2f} points of audit accuracy [{lower:+.2f}, {upper:+.2f}], n={count}; "
        f"seeds kept: {kept}"
    )
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
