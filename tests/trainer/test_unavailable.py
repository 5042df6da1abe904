from __future__ import annotations

from esperd.messages.policy import Arm
from esperd.trainer.unavailable import UnavailableArms

ARM, OTHER = Arm(slot="body", blueprint="conv"), Arm(slot="stem", blueprint="conv")


def offered(arms, epochs):
    return [epoch for epoch in epochs if not arms.why_not(ARM, epoch)]


def test_an_arm_rests_twice_as_long_after_every_failure_in_a_row():
    arms = UnavailableArms()
    arms.failed(ARM, 10)
    assert offered(arms, range(10, 14)) == [12, 13]
    arms.failed(ARM, 12)
    assert offered(arms, range(12, 18)) == [16, 17]
    assert arms.why_not(OTHER, 12) == ""


def test_an_arm_that_was_answered_for_starts_anew():
    arms = UnavailableArms()
    arms.failed(ARM, 10)
    arms.failed(OTHER, 11)
    arms.settled(ARM)
    assert arms.arms() == (OTHER,)
    arms.failed(ARM, 20)
    assert offered(arms, range(20, 24)) == [22, 23]


def test_what_is_known_survives_a_checkpoint():
    arms = UnavailableArms()
    arms.failed(OTHER, 3)
    arms.failed(ARM, 4)
    again = UnavailableArms(arms.entries())
    assert again.entries() == arms.entries()
    assert again.arms() == (ARM, OTHER)
