"""Who is taken for hung, and who never is: decided from looks alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.actors.stillness import SHARE, Stillness

TIMEOUT_S = 100.0
LOOKS = round(TIMEOUT_S / Stillness(TIMEOUT_S).every_s)

looks = st.lists(
    st.tuples(st.integers(0, 30).map(lambda n: int(n == 0)), st.sampled_from([0.0, 0.01, 0.09, 0.11, 0.5]), st.integers(0, 99)),
    min_size=LOOKS,
    max_size=6 * LOOKS,
)
"""Steps taken since the look before, processor seconds taken since, and 0 for one who is occupied."""


@given(looks)
def test_who_took_a_step_or_one_per_cent_of_a_processor_or_waited_for_us_within_the_timeout_is_never_taken_for_hung(history):
    stillness, step, cpu_s = Stillness(TIMEOUT_S), 0, 0.0
    for number, (steps, used_s, luck) in enumerate(history):
        step, cpu_s = step + steps, cpu_s + used_s
        if stillness.look(step, cpu_s, occupied=luck == 0):
            last = history[number - LOOKS + 1 : number + 1]
            assert len(last) == LOOKS
            assert not any(steps for steps, _, _ in last)
            assert sum(used_s for _, used_s, _ in last) < SHARE * TIMEOUT_S + 1e-9, "differences of sums round"
            assert all(luck for _, _, luck in last)
            break


def looks_until_hung(used_s: float, step: int | None = 7) -> int | None:
    stillness = Stillness(TIMEOUT_S)
    return next((number for number in range(3 * LOOKS) if stillness.look(step, used_s * number)), None)


@pytest.mark.parametrize("step", [None, 0, 7])
def test_one_that_only_beats_is_hung_when_the_timeout_is_over_also_before_its_first_step(step: int | None) -> None:
    assert looks_until_hung(0.004 * Stillness(TIMEOUT_S).every_s, step) == LOOKS
    assert looks_until_hung(0.02 * Stillness(TIMEOUT_S).every_s, step) is None


def test_where_nobody_can_tell_what_a_process_does_it_is_not_judged() -> None:
    stillness = Stillness(TIMEOUT_S)
    assert not any(stillness.look(7, None) for _ in range(3 * LOOKS))


def test_a_descendant_that_ends_and_takes_its_time_along_makes_nothing_of_what_others_do() -> None:
    stillness = Stillness(TIMEOUT_S)
    stillness.look(7, 5_000.0)
    assert not any(stillness.look(7, 0.02 * stillness.every_s * number) for number in range(3 * LOOKS))


def test_one_that_worked_and_then_hangs_is_hung_the_timeout_after_its_last_work() -> None:
    stillness = Stillness(TIMEOUT_S)
    work_s = [1.0 * number for number in range(5)]
    assert not any(stillness.look(7, used_s) for used_s in work_s)
    still = [stillness.look(7, work_s[-1]) for _ in range(LOOKS)]
    assert still == [False] * (LOOKS - 1) + [True]
