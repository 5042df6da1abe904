"""At the edge a request is asked again where that is safe, and not before the daemon said so."""

from __future__ import annotations

import pytest
import stamina

from esperd.actors.retrying import IDEMPOTENT, asked_patiently, wait_before_retry
from esperd.errors import ActorUnavailable, AskTimeout, Busy, Conflict, ReadOnly
from esperd.messages import MESSAGE_TYPES, Done, Reply
from esperd.messages.jobs import CancelJob, GetJob, ListJobs, PauseJob

BUSY = Busy("1000 jobs wait", retry_after_s=0.01)
AWAY = ActorUnavailable("jobs is being restarted")


class Daemon:
    def __init__(self, *script):
        self.script, self.asked = list(script), 0

    async def answer(self):
        self.asked += 1
        if self.script:
            raise self.script.pop(0)
        return Done()


@pytest.fixture(autouse=True)
def silent():
    stamina.instrumentation.set_on_retry_hooks(())
    yield
    stamina.instrumentation.set_on_retry_hooks(None)


@pytest.mark.asyncio
async def test_a_busy_daemon_is_asked_again_and_so_is_one_that_restarts_where_asking_twice_does_no_harm():
    daemon = Daemon(BUSY, BUSY, AWAY)
    assert await asked_patiently(daemon.answer, GetJob(id="j1"), 30.0) == Done()
    assert daemon.asked == 4


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("message", "error", "patience_s"),
    [
        (PauseJob(id="j1"), AWAY, 30.0),  # it may have been carried out
        (GetJob(id="j1"), Conflict("the key was used"), 30.0),
        (GetJob(id="j1"), AskTimeout("no answer"), 30.0),  # the caller said how long it waits
        (GetJob(id="j1"), ReadOnly("the disk is full", retry_after_s=10.0), 30.0),  # a person must hear of it
        (GetJob(id="j1"), BUSY, 0.0),
    ],
)
async def test_what_another_try_would_not_mend_or_might_do_twice_is_an_error_at_once(message, error, patience_s):
    daemon = Daemon(error, error)
    with pytest.raises(type(error)):
        await asked_patiently(daemon.answer, message, patience_s)
    assert daemon.asked == 1


@pytest.mark.asyncio
async def test_a_watcher_outlasts_a_line_that_is_cut_for_a_while_and_repeats_only_what_reads():
    cut = AskTimeout("no answer")
    daemon = Daemon(cut, cut)
    assert await asked_patiently(daemon.answer, GetJob(id="j1"), 30.0, watching=True) == Done()
    assert daemon.asked == 3
    with pytest.raises(AskTimeout):
        await asked_patiently(Daemon(cut).answer, PauseJob(id="j1"), 30.0, watching=True)


def test_the_daemon_says_when():
    assert wait_before_retry(CancelJob(id="j1"), Busy("", retry_after_s=5.0)) == 5.0
    assert wait_before_retry(ListJobs(), Busy("")) is True


def test_whatever_only_reads_is_known_to_be_safe():
    asking = [
        kind for kind in MESSAGE_TYPES if kind.__name__.startswith(("List", "Get", "Fetch")) and not issubclass(kind, Reply)
    ]
    assert set(asking) <= set(IDEMPOTENT)
