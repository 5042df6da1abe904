"""Requests to the policy, built by hand, and random ones by hypothesis."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from esperd.messages.growth import Contribution, SeedRecord, SlotRecord, Stage, Trial
from esperd.messages.policy import Arm, ArmMerit, ArmOption, ArmTrial, Decide, Observation, PolicySettings

SLOTS = tuple(
    SlotRecord(slot=name, topology="cnn", shape=(channels, 8, 8), dtype="float32", module="Conv2d")
    for name, channels in (("s1", 8), ("s2", 16), ("s3", 32))
)
BLUEPRINTS = ("conv", "gate", "norm", "wide")


def option(slot="s1", blueprint="conv", *, parameters=100, flops=1000.0, available=True):
    return ArmOption(
        arm=Arm(slot=slot, blueprint=blueprint),
        parameters=parameters,
        flops_per_sample=flops,
        available=available,
        why_not="" if available else "the slot is taken",
    )


def contribution(loss, half_width=0.001, epoch=5):
    return Contribution(loss=loss, lower=loss - half_width, upper=loss + half_width, confidence=0.95, samples=360, epoch=epoch)


def seed(name, *, stage, blueprint="conv", measured=None, screening=""):
    return SeedRecord(
        seed=name,
        slot=name.partition("#")[0],
        blueprint=blueprint,
        stage=stage,
        alpha=1.0,
        parameters=100,
        flops_per_sample=1000.0,
        germinated_epoch=1,
        epochs_in_stage=1,
        contribution=measured,
        screening=screening,
    )


def observation(**fields):
    return Observation(
        **{
            "epoch": 5,
            "progress": 0.2,
            "epochs_left": 40.0,
            "shortest_life_epochs": 9,
            "train_loss": 0.5,
            "gate_loss": 0.6,
            "gate_metric": 0.8,
            "gate_losses": (0.9, 0.7, 0.6),
            "host_parameters": 1000,
            "host_flops_per_sample": 10_000.0,
            "seeds": (),
            "slots": SLOTS,
            "options": (option(),),
            **fields,
        }
    )


def request(seen, *, policy=None, state=b"", heard=None, point=3, rng_seed=0, evidence=()):
    return Decide(
        job="j",
        point=point,
        rng_seed=rng_seed,
        settings=policy or PolicySettings(strategy="ucb"),
        observation=seen,
        state=state,
        heard=heard,
        evidence=evidence,
    )


SCOUTING = ("gauge", "try")


def scouted(decide, asked, worth=None):
    """What a strategy answers in the end, once everything it wants to measure first was measured.

    Args:
        decide: the strategy.
        asked: a request.
        worth: what an arm brings in a contest, and its gradient merit; None: something that its name decides.
    """
    worth = worth or (lambda arm: 0.01 + (sum(map(ord, arm.slot + arm.blueprint)) * 37 % 101) / 1000)
    answer, epoch = decide(asked), asked.observation.epoch
    for _ in range(20):
        wanted = [decision for decision in answer.decisions if decision.action in SCOUTING]
        if not wanted:
            return answer
        assert len(wanted) == len(answer.decisions), "nothing is decided before it is measured"
        merits = [
            ArmMerit(arm=decision.arm, norm=worth(decision.arm), batches=decision.batches, epoch=epoch)
            for decision in wanted
            if decision.action == "gauge"
        ]
        trials = [
            ArmTrial(arm=decision.arm, epochs=decision.epochs, trial=contested(worth(decision.arm)), epoch=epoch)
            for decision in wanted
            if decision.action == "try"
        ]
        seen = msgspec.structs.replace(asked.observation, merits=tuple(merits), trials=tuple(trials))
        asked = msgspec.structs.replace(asked, observation=seen, state=answer.state, point=asked.point + 1)
        answer = decide(asked)
    raise AssertionError("it measures for ever")


def contested(loss, *, half_width=0.001):
    return Trial(
        loss=loss,
        lower=loss - half_width,
        upper=loss + half_width,
        confidence=0.95,
        samples=360,
        steps_with=8,
        steps_without=10,
        flops=1e6,
        epoch=5,
    )


slots, blueprints = st.sampled_from([record.slot for record in SLOTS]), st.sampled_from(BLUEPRINTS)
options = st.lists(
    st.builds(option, slots, blueprints, parameters=st.integers(1, 5000), available=st.booleans()),
    max_size=12,
    unique_by=lambda made: made.arm,
)
seeds = st.lists(
    st.builds(
        seed,
        st.builds(lambda slot, n: f"{slot}#{n}", slots, st.integers(1, 9)),
        stage=st.sampled_from(Stage),
        blueprint=blueprints,
        measured=st.none() | st.builds(contribution, st.floats(-0.1, 0.1), st.floats(0, 0.05), st.integers(0, 3)),
        screening=st.sampled_from(["", "point 1"]),
    ),
    max_size=4,
    unique_by=lambda record: record.seed,
)
observations = st.builds(
    lambda **fields: observation(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}),
    epoch=st.integers(0, 9),
    progress=st.floats(0.0, 1.0),
    gate_loss=st.floats(0.0, 2.0),
    seeds=seeds,
    options=options,
)
policies = st.builds(
    PolicySettings,
    exploration=st.floats(0.0, 4.0),
    discount=st.floats(0.1, 1.0),
    temperature=st.floats(0.01, 10.0),
    max_live_seeds=st.integers(1, 3),
    max_fossilized=st.integers(0, 4),
    nursery=st.integers(1, 3),
    warmup_epochs=st.just(2),
    latest_germination=st.just(0.9),
)
