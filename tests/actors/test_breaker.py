"""A service that keeps failing is left alone, tried with one request, and asked again once it answers."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esperd.actors.breaker import Breaker, Circuit, Limits, ask, fail, give_up, succeed
from esperd.errors import AskTimeout, BlueprintRejected, CircuitOpen
from esperd.messages.control import BreakerState

LIMITS = Limits(failures=3, reset_s=10.0)


class AnyHistory(RuleBasedStateMachine):
    """Requests that are asked, answered, failed and given up in any order, at any time."""

    def __init__(self):
        super().__init__()
        self.circuit = Circuit()
        self.now = 0.0
        self.open: list[int] = []

    @rule(seconds=st.floats(0.0, 25.0))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def asked(self):
        before = self.circuit
        self.circuit, may = ask(before, self.now, LIMITS)
        rested = self.now - before.opened_at >= LIMITS.reset_s
        assert may == (before.state is BreakerState.CLOSED or (before.state is BreakerState.OPEN and rested))
        if may:
            self.open.append(self.circuit.era)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "give_up"]))
    def ended(self, data, how):
        era = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        before = self.circuit
        match how:
            case "succeed":
                self.circuit = succeed(before, era)
            case "fail":
                self.circuit = fail(before, era, self.now, LIMITS)
            case "give_up":
                self.circuit = give_up(before, era)
        if era != before.era:
            assert self.circuit == before  # what was asked under another state says nothing of this one
        elif how == "succeed":
            assert (self.circuit.state, self.circuit.failures) == (BreakerState.CLOSED, 0)
        elif how == "fail":
            opens = before.state is BreakerState.HALF_OPEN or before.failures + 1 >= LIMITS.failures
            assert self.circuit.state is (BreakerState.OPEN if opens else BreakerState.CLOSED)

    @invariant()
    def one_request_at_most_is_the_probe_and_a_half_open_circuit_has_one(self):
        probes = self.open.count(self.circuit.era)
        assert self.circuit.state is not BreakerState.HALF_OPEN or probes == 1
        assert self.circuit.state is not BreakerState.OPEN or probes == 0

    @invariant()
    def it_is_open_for_a_reason(self):
        assert (self.circuit.state is BreakerState.CLOSED) or self.circuit.failures >= LIMITS.failures


AnyHistory.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase


class Service:
    def __init__(self):
        self.now = 0.0
        self.asked = 0
        self.states = []
        self.breaker = Breaker("compiler", LIMITS, lambda: self.now, (AskTimeout,), lambda found: self.states.append(found.state))

    def ask(self, error=None):
        with self.breaker.attempt():
            self.asked += 1
            if error is not None:
                raise error


def test_after_three_failures_nothing_is_asked_until_its_time_and_an_answer_closes_it():
    service = Service()
    for _ in range(3):
        with pytest.raises(AskTimeout):
            service.ask(AskTimeout("compiler did not answer"))
    service.now = 4.0
    with pytest.raises(CircuitOpen, match=r"failed 3 times in a row \(last: ask_timeout: .*\); it is asked again in 6 s"):
        service.ask()
    assert service.asked == 3
    service.now = 10.0
    with pytest.raises(AskTimeout):
        service.ask(AskTimeout("still not"))
    with pytest.raises(CircuitOpen):
        service.ask()
    service.now = 20.0
    service.ask()
    assert (service.breaker.status().state, service.breaker.status().opened) == (BreakerState.CLOSED, 2)
    assert service.states == ["open", "half_open", "open", "half_open", "closed"]


def test_an_error_that_does_not_speak_against_the_service_is_an_answer():
    service = Service()
    for error in [AskTimeout("no"), AskTimeout("no"), BlueprintRejected("not identity"), AskTimeout("no"), AskTimeout("no")]:
        with pytest.raises(type(error)):
            service.ask(error)
    assert service.breaker.status().state is BreakerState.CLOSED


@pytest.mark.asyncio
async def test_a_probe_that_is_cancelled_leaves_the_next_one_to_try():
    service = Service()
    for _ in range(3):
        with pytest.raises(AskTimeout):
            service.ask(AskTimeout("no"))
    service.now = 10.0
    with anyio.CancelScope() as scope, service.breaker.attempt():
        scope.cancel()
        await anyio.sleep(1)
    assert service.breaker.status().state is BreakerState.OPEN
    service.ask()
    assert service.breaker.status().state is BreakerState.CLOSED
