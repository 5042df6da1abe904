"""When growth ends: the expected gain per FLOP of the best arm against that of training on, in numbers that can be checked."""

from __future__ import annotations

import msgspec
import pytest
from policy_requests import observation, option, request, seed

from esperd.builtins.strategies import STRATEGIES
from esperd.declarations import resolve
from esperd.messages.growth import Stage
from esperd.messages.policy import Arm, ArmMerit, PolicySettings
from esperd.policy.obstacles import network_flops
from esperd.policy.state import ArmStatistics, AskedArm, BanditState, decode_state
from esperd.policy.stop_rule import epoch_flops, training_gain

DECIDE = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}
EPOCH = 1e6
"""FLOPs of one epoch; a seed of ``option()`` takes a tenth of the network's."""


def state(*, mean=0.05, pulls=2):
    known = ArmStatistics(arm=Arm(slot="s1", blueprint="conv"), pulls=pulls, total=mean * pulls, squares=mean * mean * pulls)
    return BanditState(arms=(known,)).encode()


def decided(losses, *, stop_rule=True, remembered=None, strategy="ucb", min_share=0.0, **seen):
    flops = tuple(EPOCH * n for n in range(1, len(losses) + 1))
    seen = {"gate_flops": flops, "epochs_left": 40.0, **seen}
    told = observation(gate_losses=tuple(losses), gate_loss=losses[-1], **seen)
    policy = PolicySettings(strategy=strategy, stop_rule=stop_rule, exploration=0.0, min_share=min_share)
    return DECIDE[strategy](request(told, policy=policy, state=remembered or state())).decisions[-1]


def falling(by):
    return [1.0 - by * n for n in range(8)]


# A seed takes 40 epochs of a tenth of 1e6 FLOPs, so 4e6, and saves 0.05: 0.0125 for each epoch's worth of FLOPs. Training on is
# expected to save at the end of the budget 8/48 of what an epoch saves now: as much, where that is 0.075.


def test_growth_ends_where_training_on_saves_more_per_flop():
    assert decided(falling(0.074)).action == "germinate"
    stopped = decided(falling(0.076))
    assert (stopped.action, stopped.arm) == ("wait", Arm(slot="s1", blueprint="conv"))
    assert stopped.reason == (
        "stop rule: the best available arm promises 0.05 of loss after rent (mean of 2 tries) for the 4e+06 FLOPs it takes to "
        "the end of the budget, 1.25e+04 per TFLOP; the last FLOPs of training on bring 1.27e+04 per TFLOP (from 5 gate losses)"
    )


def test_the_rule_holds_unless_it_is_switched_off():
    assert PolicySettings().stop_rule
    assert decided(falling(0.1), stop_rule=False).action == "germinate"


def test_the_least_that_is_explored_is_no_reason_to_grow_where_growth_ends():
    """``min_share`` says what is grown first, not that anything is."""
    due = {"options": (option(), option("s2", "gate")), "remembered": state(pulls=4), "min_share": 1.0}
    grown = decided(falling(0.074), **due)
    assert (grown.action, grown.arm) == ("germinate", Arm(slot="s2", blueprint="gate"))
    assert "due by min_share" in grown.reason
    stopped = decided(falling(0.076), **due)
    assert stopped.action == "wait"
    assert stopped.reason.startswith("stop rule:")


def test_while_growth_goes_on_an_arm_that_is_due_is_tried_whatever_it_promises():
    cheap, dear = option("s2", "gate", flops=10.0), option("s1", "wide")
    known = ArmStatistics(arm=cheap.arm, pulls=8, total=0.4, squares=0.02)
    seen = {"options": (cheap, dear), "remembered": BanditState(arms=(known,)).encode()}
    assert decided(falling(0.1), **seen).arm == cheap.arm, "of the other one nobody knows, and it promises less than training on"
    due = decided(falling(0.1), min_share=1.0, **seen)
    assert (due.action, due.arm) == ("germinate", dear.arm)
    assert "due by min_share" in due.reason


def test_what_was_refused_says_nothing_of_what_seeds_bring():
    flat = [1.0 - 1e-4 * n for n in range(8)]
    asked = tuple(AskedArm(arm=Arm(slot=slot, blueprint="conv"), rent=0.001) for slot in ("s1", "s2"))
    seen = {"options": (option("s1"), option("s2"), option("s3")), "remembered": BanditState(asked=asked).encode()}
    grown = decided(flat, **seen)
    assert (grown.action, grown.arm) == ("germinate", Arm(slot="s3", blueprint="conv"))


def test_the_rule_does_not_speak_for_an_arm_that_would_not_be_grown_anyway():
    merits = (
        ArmMerit(arm=Arm(slot="s1", blueprint="conv"), norm=3.0, batches=4, epoch=5),
        ArmMerit(arm=Arm(slot="s2", blueprint="norm"), norm=None, batches=4, epoch=5, why_not="its pass raised X"),
    )
    known = ArmStatistics(arm=Arm(slot="s3", blueprint="conv"), pulls=2, total=0.1, squares=0.005)
    options = (option(), option("s2", "norm", flops=0.0), option("s3", available=False))
    remembered = BanditState(arms=(known,), merits=merits).encode()
    waits = decided(falling(0.1), options=options, remembered=remembered, strategy="gradient_merit")
    assert (waits.action, waits.arm) == ("wait", Arm(slot="s1", blueprint="conv"))
    assert waits.reason.startswith("stop rule:")


def test_the_rule_is_asked_anew_at_each_point():
    flat = [*falling(0.1), 0.3, 0.3, 0.3, 0.3, 0.3]
    assert decided(falling(0.1)).action == "wait"
    assert decided(flat).action == "germinate", "training on brings nothing any more"


def test_seeds_get_dearer_the_more_of_the_budget_is_left():
    assert decided(falling(0.08), epochs_left=25.0).action == "germinate"
    assert decided(falling(0.08), epochs_left=40.0).action == "wait"


def test_an_arm_never_tried_is_expected_to_earn_what_tries_earned():
    cheap = option("s2", "gate", flops=100.0)
    seen = {"options": (option(), cheap)}
    assert decided(falling(0.5), **seen).arm == cheap.arm, "ten times cheaper, it may be grown"
    assert decided(falling(0.8), **seen).action == "wait"
    assert "never tried, the mean of all tries" in decided(falling(0.8), **seen).reason


def test_what_is_grown_is_what_promises_enough_and_an_arm_without_counted_flops_does_not_speak_for_others():
    """A norm costs no counted FLOP, so it promises infinitely much for each: that says nothing of a convolution."""
    known = BanditState(
        arms=(
            ArmStatistics(arm=Arm(slot="s1", blueprint="conv"), pulls=2, total=0.02, squares=2e-4),
            ArmStatistics(arm=Arm(slot="s2", blueprint="norm"), pulls=2, total=0.002, squares=2e-6),
        )
    ).encode()
    free = option("s2", "norm", flops=0.0)
    grown = decided(falling(0.05), options=(option(), free), remembered=known)
    assert (grown.action, grown.arm) == ("germinate", free.arm), "the convolution promises more, and less than training on"
    assert decided(falling(0.05), options=(option(), free), remembered=known, stop_rule=False).arm == option().arm
    failed = ArmStatistics(arm=free.arm, pulls=2, total=-0.1, squares=0.005)
    lost = BanditState(arms=(decode_state(known).arms[0], failed)).encode()
    stopped = decided(falling(0.05), options=(option(), free), remembered=lost, strategy="uniform")
    assert (stopped.action, stopped.arm) == ("wait", option().arm)
    alone = decided(falling(0.05), options=(free,), remembered=lost, strategy="uniform")
    assert "promises -0.05 of loss after rent (mean of 2 tries) for no counted FLOPs" in alone.reason


@pytest.mark.parametrize(
    ("losses", "told", "remembered"),
    [
        (falling(0.5)[:2], {}, None),
        (falling(0.5), {"epochs_left": None}, None),
        (falling(0.5), {}, state(pulls=1)),
        (falling(-0.5), {}, None),
    ],
    ids=["too few losses", "no end in epochs", "one try", "a loss that rises"],
)
def test_where_too_little_is_known_nothing_is_stopped(losses, told, remembered):
    assert decided(losses, remembered=remembered, **told).action == "germinate"


def test_one_bad_gate_pass_does_not_move_the_slope():
    losses = falling(0.01)
    flops = tuple(EPOCH * n for n in range(1, 9))
    plain = observation(gate_losses=tuple(losses), gate_flops=flops)
    losses[-3] += 0.5
    spiked = msgspec.structs.replace(plain, gate_losses=tuple(losses))
    assert training_gain(plain, 5) == pytest.approx(0.01 / EPOCH)
    assert training_gain(spiked, 5) == pytest.approx(0.01 / EPOCH, rel=0.01)


def test_epochs_that_a_rollback_took_back_are_no_part_of_what_one_costs():
    spent = tuple(EPOCH * number for number in (1, 2, 3, 7))  # three epochs were lost before the last gate loss
    assert epoch_flops(observation(gate_losses=(1.0,) * 4, gate_flops=spent)) == EPOCH
    assert epoch_flops(observation(gate_losses=(1.0,), gate_flops=(EPOCH,))) is None


def test_a_culled_seed_that_rests_is_no_part_of_the_network():
    living, kept, culled = (
        seed(f"s{number}#1", stage=stage) for number, stage in ((1, Stage.TRAINING), (2, Stage.FOSSILIZED), (3, Stage.EMBARGOED))
    )
    seen = observation(seeds=(living, kept, culled))
    assert network_flops(seen) == seen.host_flops_per_sample + living.flops_per_sample + kept.flops_per_sample


def test_losses_without_their_flops_give_no_slope():
    assert training_gain(observation(gate_losses=(1.0, 0.9, 0.8, 0.7)), 5) is None
    assert training_gain(observation(gate_losses=(1.0, 0.9, 0.8), gate_flops=(1.0, 1.0, 1.0)), 5) is None


@pytest.mark.parametrize("scouted", [(2, 6), (7,)], ids=["twice", "before the latest loss"])
def test_what_arms_took_that_were_measured_is_no_part_of_what_an_epoch_costs(scouted):
    """A contest after epoch n is spent when the gate loss of epoch n + 1 is measured."""
    losses = falling(0.076)
    tried = [10 * EPOCH * sum(epoch < number for epoch in scouted) for number in range(1, 9)]
    spent = tuple(EPOCH * number + more for number, more in zip(range(1, 9), tried, strict=True))
    told = observation(gate_losses=tuple(losses), gate_flops=spent, trial_flops=tuple(tried))
    assert epoch_flops(told) == EPOCH
    assert training_gain(told, 5) == pytest.approx(0.076 / EPOCH)
    assert decided(losses, gate_flops=spent, trial_flops=tuple(tried)) == decided(losses)
    late = msgspec.structs.replace(told, trial_flops=tuple(tried[-3:]))
    assert epoch_flops(late) == EPOCH, "known of the latest losses only"
