from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esperd.actors.supervisor import (
    FINISHED_KEPT,
    Add,
    Escalate,
    Exited,
    Instruction,
    NotifyWatchers,
    Phase,
    RestartLimits,
    Start,
    Started,
    Stop,
    StopRequested,
    Strategy,
    Supervisor,
    Tick,
)
from esperd.messages.control import ActorState


class Longest(random.Random):
    """Jitter that always draws the upper bound, so that tests can state it."""

    def uniform(self, a: float, b: float) -> float:
        return b


def supervisor(strategy: Strategy = "one_for_one", **limits: Any) -> Supervisor:
    return Supervisor(strategy, RestartLimits(**limits), rng=Longest())


def run(machine: Supervisor, *names: str, restart: Any = "permanent") -> None:
    for name in names:
        machine.handle(Add(name, restart), 0.0)
        machine.handle(Started(name, 1), 0.0)


def state(machine: Supervisor, name: str) -> ActorState:
    child = machine.child(name)
    assert child is not None
    return child.state


def test_an_added_actor_is_started_at_once_as_its_first_generation() -> None:
    machine = supervisor()
    assert machine.handle(Add("a", "permanent"), 0.0) == [Start("a", 1)]
    assert state(machine, "a") is ActorState.STARTING
    assert machine.handle(Started("a", 1), 0.0) == []
    assert state(machine, "a") is ActorState.RUNNING


def test_a_crashed_actor_waits_its_backoff_and_comes_back_as_the_next_generation() -> None:
    machine = supervisor()
    run(machine, "a")
    assert machine.handle(Exited("a", 1, "boom", expected=False), 10.0) == [NotifyWatchers("a", 1, "boom", True)]
    assert state(machine, "a") is ActorState.WAITING
    assert machine.next_due() == pytest.approx(10.1)
    assert machine.handle(Tick(), 10.05) == []
    assert machine.handle(Tick(), 10.1) == [Start("a", 2)]
    child = machine.child("a")
    assert child is not None
    assert (child.restarts, child.last_error) == (1, "boom")


def test_the_backoff_doubles_with_every_crash_up_to_its_limit_and_starts_afresh_after_a_stable_life() -> None:
    machine = supervisor(max_restarts=100, backoff_s=0.1, backoff_max_s=1.0, stable_after_s=60.0)
    run(machine, "a")
    now, waits = 0.0, []
    for generation in range(1, 7):
        machine.handle(Exited("a", generation, "boom", expected=False), now)
        due = machine.next_due()
        assert due is not None
        waits.append(round(due - now, 6))
        now = due
        machine.handle(Tick(), now)
        machine.handle(Started("a", generation + 1), now)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    machine.handle(Exited("a", 7, "boom", expected=False), now + 60.0)
    assert machine.next_due() == pytest.approx(now + 60.1)


def test_the_fourth_crash_within_the_window_escalates() -> None:
    machine = supervisor()
    run(machine, "a")
    for generation in (1, 2, 3):
        machine.handle(Exited("a", generation, "boom", expected=False), float(generation))
        machine.handle(Tick(), float(generation) + 0.9)
        machine.handle(Started("a", generation + 1), float(generation) + 0.9)
    instructions = machine.handle(Exited("a", 4, "boom", expected=False), 4.0)
    assert instructions[0] == NotifyWatchers("a", 4, "boom", False)
    assert isinstance(instructions[1], Escalate)
    assert "4 times within 30 s" in instructions[1].reason
    assert state(machine, "a") is ActorState.FAILED


def test_crashes_that_are_far_apart_never_escalate() -> None:
    machine = supervisor()
    run(machine, "a")
    for generation in range(1, 50):
        now = generation * 31.0
        machine.handle(Exited("a", generation, "boom", expected=False), now)
        assert machine.handle(Tick(), now + 30.0) == [Start("a", generation + 1)]
        machine.handle(Started("a", generation + 1), now + 30.0)


@pytest.mark.parametrize(
    ("restart", "expected", "comes_back"),
    [
        ("permanent", True, True),
        ("permanent", False, True),
        ("transient", True, False),
        ("transient", False, True),
        ("temporary", True, False),
        ("temporary", False, False),
    ],
)
def test_who_comes_back_after_which_end(restart: Any, *, expected: bool, comes_back: bool) -> None:
    machine = supervisor()
    run(machine, "a", restart=restart)
    assert machine.handle(Exited("a", 1, "over", expected), 1.0) == [NotifyWatchers("a", 1, "over", comes_back)]
    assert (machine.next_due() is not None) is comes_back
    if not comes_back:
        assert state(machine, "a") is (ActorState.STOPPED if expected else ActorState.FAILED)


def test_an_actor_whose_first_start_fails_is_given_up_unless_that_is_forgiven() -> None:
    machine = supervisor()
    machine.handle(Add("a", "permanent"), 0.0)
    assert machine.handle(Exited("a", 1, "no", expected=False), 0.0) == [NotifyWatchers("a", 1, "no", False)]
    assert state(machine, "a") is ActorState.FAILED
    machine.handle(Add("b", "permanent", forgive_start=True), 0.0)
    assert machine.handle(Exited("b", 1, "no", expected=False), 0.0) == [NotifyWatchers("b", 1, "no", True)]


def test_the_words_of_an_older_generation_are_void() -> None:
    machine = supervisor()
    run(machine, "a")
    machine.handle(Exited("a", 1, "boom", expected=False), 0.0)
    machine.handle(Tick(), 1.0)
    assert machine.handle(Exited("a", 1, "boom", expected=False), 1.0) == []
    assert machine.handle(Started("a", 1), 1.0) == []
    assert state(machine, "a") is ActorState.STARTING


def test_a_stopped_actor_does_not_come_back() -> None:
    machine = supervisor()
    run(machine, "a")
    assert machine.handle(StopRequested("a"), 0.0) == [Stop("a", 1)]
    assert machine.handle(StopRequested("a"), 0.0) == []
    assert machine.handle(Exited("a", 1, "stopped", expected=True), 0.0) == [NotifyWatchers("a", 1, "stopped", False)]
    assert state(machine, "a") is ActorState.STOPPED
    assert machine.next_due() is None


def test_an_actor_that_waits_for_its_restart_is_stopped_without_another_word() -> None:
    machine = supervisor()
    run(machine, "a")
    machine.handle(Exited("a", 1, "boom", expected=False), 0.0)
    assert machine.handle(StopRequested("a"), 0.0) == [NotifyWatchers("a", 1, "stopped", False)]
    assert machine.handle(Tick(), 100.0) == []


def test_everybody_is_stopped_in_reverse_order_one_after_the_other() -> None:
    machine = supervisor()
    run(machine, "a", "b", "c")
    assert machine.handle(StopRequested(), 0.0) == [Stop("c", 1)]
    assert machine.handle(Exited("c", 1, "stopped", expected=True), 0.0)[-1] == Stop("b", 1)
    assert machine.handle(Exited("b", 1, "stopped", expected=True), 0.0)[-1] == Stop("a", 1)
    assert machine.handle(Exited("a", 1, "stopped", expected=True), 0.0) == [NotifyWatchers("a", 1, "stopped", False)]


def test_a_crash_while_all_stop_is_an_end() -> None:
    machine = supervisor("one_for_all")
    run(machine, "a", "b", "c")
    machine.handle(StopRequested(), 0.0)
    assert machine.handle(Exited("a", 1, "boom", expected=False), 0.0) == [NotifyWatchers("a", 1, "boom", False)]
    assert machine.handle(Exited("c", 1, "stopped", expected=True), 0.0)[-1] == Stop("b", 1)
    with pytest.raises(ValueError, match="being stopped"):
        machine.handle(Add("d", "permanent"), 0.0)


def test_a_name_is_free_again_once_its_actor_ended_and_its_generations_go_on() -> None:
    machine = supervisor()
    run(machine, "a")
    with pytest.raises(ValueError, match="exists already"):
        machine.handle(Add("a", "permanent"), 0.0)
    machine.handle(StopRequested("a"), 0.0)
    machine.handle(Exited("a", 1, "stopped", expected=True), 0.0)
    assert machine.handle(Add("a", "permanent"), 0.0) == [Start("a", 2)]


def test_one_for_all_takes_everybody_down_and_starts_them_again_in_their_order() -> None:
    machine = supervisor("one_for_all")
    run(machine, "a", "b", "c")
    assert machine.handle(Exited("b", 1, "boom", expected=False), 0.0) == [
        NotifyWatchers("b", 1, "boom", True),
        Stop("c", 1),
        Stop("a", 1),
    ]
    assert machine.handle(Tick(), 1.0) == []
    assert machine.handle(Exited("a", 1, "stopped", expected=True), 1.0) == [NotifyWatchers("a", 1, "stopped", True)]
    assert machine.handle(Exited("c", 1, "stopped", expected=True), 1.0) == [
        NotifyWatchers("c", 1, "stopped", True),
        Start("a", 2),
    ]
    assert machine.handle(Started("a", 2), 1.0) == [Start("b", 2)]
    assert machine.handle(Started("b", 2), 1.0) == [Start("c", 2)]


def test_rest_for_one_takes_down_only_who_was_started_later() -> None:
    machine = supervisor("rest_for_one")
    run(machine, "a", "b", "c")
    assert machine.handle(Exited("b", 1, "boom", expected=False), 0.0) == [
        NotifyWatchers("b", 1, "boom", True),
        Stop("c", 1),
    ]
    assert state(machine, "a") is ActorState.RUNNING
    machine.handle(Exited("c", 1, "stopped", expected=True), 0.05)
    assert machine.handle(Tick(), 1.0) == [Start("b", 2)]
    assert machine.handle(Started("b", 2), 1.0) == [Start("c", 2)]


def test_a_temporary_sibling_that_is_taken_down_stays_down() -> None:
    machine = supervisor("one_for_all")
    run(machine, "a")
    run(machine, "t", restart="temporary")
    machine.handle(Exited("a", 1, "boom", expected=False), 0.0)
    assert machine.handle(Exited("t", 1, "stopped", expected=True), 1.0) == [
        NotifyWatchers("t", 1, "stopped", False),
        Start("a", 2),
    ]


def test_a_sibling_stopped_for_good_during_a_group_restart_is_not_waited_for() -> None:
    machine = supervisor("one_for_all")
    run(machine, "a", "b")
    machine.handle(Exited("b", 1, "boom", expected=False), 0.0)
    machine.handle(StopRequested("a"), 0.0)
    machine.handle(Exited("a", 1, "stopped", expected=True), 0.0)
    assert machine.handle(Tick(), 1.0) == [Start("b", 2)]


def test_only_the_latest_ended_actors_are_remembered() -> None:
    machine = supervisor()
    for number in range(FINISHED_KEPT + 20):
        run(machine, f"job-{number}", restart="temporary")
        machine.handle(Exited(f"job-{number}", 1, "finished", expected=True), 0.0)
    assert len(machine.children()) == FINISHED_KEPT
    assert machine.child("job-0") is None


class AnyStory(RuleBasedStateMachine):
    """A shell that obeys every instruction, and a world in which anything may crash at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.alive: dict[str, int] = {}
        self.ready: set[str] = set()
        self.told_to_stop: set[str] = set()
        self.seen: dict[str, int] = {}
        self.crashes: dict[str, list[float]] = {}
        self.added: list[str] = []
        self.stopping_all = False
        self.stopped_for_good: set[str] = set()

    @initialize(strategy=st.sampled_from(["one_for_one", "rest_for_one", "one_for_all"]), seed=st.integers(0, 1000))
    def begin(self, strategy: Strategy, seed: int) -> None:
        self.limits = RestartLimits()
        self.machine = Supervisor(strategy, self.limits, rng=random.Random(seed))

    def obey(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Start(name, generation):
                    assert name not in self.alive, "two incarnations at one time"
                    assert generation > self.seen.get(name, 0), "a generation came twice"
                    assert not self.stopping_all, "started while all stop"
                    assert name not in self.stopped_for_good, "a stopped actor came back"
                    self.alive[name] = self.seen[name] = generation
                    self.ready.discard(name)
                    self.told_to_stop.discard(name)
                case Stop(name, generation):
                    assert self.alive.get(name) == generation, "told nobody to stop"
                    assert name not in self.told_to_stop, "told twice"
                    self.told_to_stop.add(name)
                case NotifyWatchers(name, _, _, will_restart):
                    child = self.machine.child(name)
                    # Whose wait was over before the last of the others had stopped is started in the same breath.
                    assert child is None or child.phase in (Phase.WAITING, Phase.STARTING) or not will_restart
                case Escalate(name, _):
                    recent = [at for at in self.crashes[name] if self.now - at <= self.limits.within_s]
                    assert len(recent) > self.limits.max_restarts, "escalated too early"

    @precondition(lambda self: not self.stopping_all)
    @rule(number=st.integers(0, 4), restart=st.sampled_from(["permanent", "transient", "temporary"]), forgive=st.booleans())
    def add(self, number: int, restart: Any, *, forgive: bool) -> None:
        name = f"actor-{number}"
        child = self.machine.child(name)
        if child is not None and child.phase not in (Phase.STOPPED, Phase.FAILED):
            return
        self.stopped_for_good.discard(name)
        self.added = [*(other for other in self.added if other != name), name]
        self.crashes[name] = []
        self.obey(self.machine.handle(Add(name, restart, forgive), self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.ready.add(name)
        self.obey(self.machine.handle(Started(name, self.alive[name]), self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), expected=st.booleans())
    def ends(self, data: st.DataObject, *, expected: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        generation = self.alive.pop(name)
        self.crashes[name].append(self.now)
        self.told_to_stop.discard(name)
        self.obey(self.machine.handle(Exited(name, generation, "over", expected), self.now))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def a_ghost_speaks(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.seen)))
        before = [(child.name, child.phase, child.generation) for child in self.machine.children()]
        assert self.machine.handle(Exited(name, self.seen[name] - 1, "ghost", expected=False), self.now) == []
        assert before == [(child.name, child.phase, child.generation) for child in self.machine.children()]

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def is_stopped(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.added)))
        self.stopped_for_good.add(name)
        self.obey(self.machine.handle(StopRequested(name), self.now))

    @rule()
    def all_are_stopped(self) -> None:
        self.stopping_all = True
        self.obey(self.machine.handle(StopRequested(), self.now))

    @rule(seconds=st.floats(0.0, 100.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.obey(self.machine.handle(Tick(), self.now))

    @invariant()
    def the_machine_knows_who_is_alive(self) -> None:
        if not hasattr(self, "machine"):
            return
        assert {child.name for child in self.machine.children() if child.is_alive} == set(self.alive)

    @invariant()
    def stopping_all_always_goes_on(self) -> None:
        if self.stopping_all and self.alive:
            assert self.told_to_stop, "somebody is alive and nobody is told to stop"

    def teardown(self) -> None:
        """Whatever happened: when everything starts well from here on, nobody waits for ever."""
        if not hasattr(self, "machine"):
            return
        for _ in range(100):
            for name in sorted(self.told_to_stop):
                generation = self.alive.pop(name)
                self.told_to_stop.discard(name)
                self.obey(self.machine.handle(Exited(name, generation, "stopped", True), self.now))
            for name in sorted(set(self.alive) - self.ready - self.told_to_stop):
                self.ready.add(name)
                self.obey(self.machine.handle(Started(name, self.alive[name]), self.now))
            due = self.machine.next_due()
            if due is not None:
                self.now = max(self.now, due)
                self.obey(self.machine.handle(Tick(), self.now))
        assert not [child.name for child in self.machine.children() if child.phase is Phase.WAITING]
        if self.stopping_all:
            assert not self.alive


TestAnyStory = AnyStory.TestCase
TestAnyStory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
