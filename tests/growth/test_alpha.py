"""Alpha: curves that meet both ends exactly, and a ramp that arrives when it said it would."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.growth.alpha import Ramp, cosine, linear, sigmoid, tanh

CURVES = [linear, cosine, sigmoid, tanh]


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_meets_0_and_1_exactly(curve):
    assert (curve(0.0), curve(1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("curve", CURVES)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20))
def test_every_curve_rises_and_stays_within_0_and_1(curve, times):
    values = [curve(t) for t in sorted(times)]
    assert all(before <= after for before, after in itertools.pairwise(values))
    assert values[0] >= 0.0
    assert values[-1] <= 1.0


@pytest.mark.parametrize("curve", CURVES)
@given(start=st.floats(0.0, 1.0), target=st.floats(0.0, 1.0), steps=st.integers(0, 30))
def test_a_ramp_starts_at_its_start_and_meets_its_target_exactly_after_its_steps(curve, start, target, steps):
    ramp = Ramp(target=start).toward(target, steps, curve.__name__)
    values = [ramp.value(curve)]
    for _ in range(steps):
        assert not ramp.at_rest
        ramp = ramp.step()
        values.append(ramp.value(curve))
    assert ramp.at_rest
    assert values[0] == (start if steps else target)
    assert values[-1] == target
    assert ramp.step() == ramp, "at rest it stays"
    low, high = min(start, target), max(start, target)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)


def test_a_moving_ramp_cannot_be_retargeted():
    ramp = Ramp().toward(1.0, 3, "linear").step()
    with pytest.raises(ValueError, match="1 of 3 steps"):
        ramp.toward(0.5, 2, "linear")


def test_a_resting_ramp_goes_on_from_where_it_stands():
    ramp = Ramp().toward(0.8, 1, "linear").step().toward(0.2, 2, "linear").step()
    assert ramp.value(linear) == pytest.approx(0.5)
