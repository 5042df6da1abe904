"""What is set aside for whom: for the job at the head of the queue, whether it fits, and on which card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import anyio
import anyio.to_thread
import structlog

from esperd.config import Resources
from esperd.daemon.cards import PROBE_TIMEOUT_S, Card, CardStatus, ask_driver, looked_again
from esperd.daemon.machine import Machine, Moment, moment
from esperd.daemon.placement import NOT_KNOWN, Need, allowance, need, placed
from esperd.daemon.usage import Usage
from esperd.messages.jobs import Job

FRESH_S = 5.0
"""How old a look at the cards may be when a job is given one; chosen, not measured. A look takes a tenth of a second or more."""
LOOK_FOR_CARDS_S = 60.0
"""How often a machine that showed none is asked again, when a job wants one: a driver may come up after the daemon. Chosen, not
measured."""
STUCK_S = 4 * PROBE_TIMEOUT_S
"""A look that takes longer is not waited for: a driver whose card is off the bus never answers, and cannot be killed."""
LOOKING = "a look at how much memory the cards have left"

log = structlog.get_logger(__name__)


class Placing:
    """Knows the machine, and what was decided last.

    Args:
        machine: as measured.
        monotonic: time.
        ask: for the cards as they are now; runs on a thread.
        moment: what the machine has left now.
    """

    def __init__(
        self,
        machine: Machine,
        monotonic: Callable[[], float],
        ask: Callable[[], tuple[Card, ...]] = ask_driver,
        moment: Callable[[], Moment] = moment,
    ) -> None:
        self._machine = machine
        self._monotonic = monotonic
        self._ask = ask
        self._moment = moment
        self._looked_at: float | None = None
        self._looks = anyio.CapacityLimiter(1)  # not of the threads that others wait for: a driver may never answer
        self._looking_since: float | None = None
        self._freed = 0
        self._waits: dict[str, str] = {}
        self.wanted = NOT_KNOWN
        """What the job that was looked at last takes, with its card."""
        self.look_is_due = False
        """A job waits for a look at the cards."""

    def room(self, configured: Resources) -> Machine:
        """What jobs may use together."""
        return allowance(self._machine, configured)

    def waits_for(self, job_id: str) -> str:
        """What the job waits for; empty where it does not, or for its turn."""
        return self._waits.get(job_id, "")

    def lacking(self, job_id: str, job: Job, expected: Usage, held: Iterable[Need], configured: Resources) -> str:
        """What the job at the head of the queue waits for; empty when it fits. Remembers what is set aside for it."""
        wanted = need(job, expected.peak_memory_bytes, expected.peak_gpu_bytes)
        if wanted.on_gpu and not self._is_fresh and not self._is_stuck:
            self.look_is_due = self._looking_since is None
            lacks, card = LOOKING, None
        else:
            lacks, card = placed(wanted, held, self.room(configured), self._moment(), configured.max_load)
        self.wanted = wanted if card is None else replace(wanted, card=card.uuid)
        self._waits = {job_id: lacks} if lacks else {}
        return lacks

    @property
    def _is_fresh(self) -> bool:
        age_s = FRESH_S if self._machine.cards else LOOK_FOR_CARDS_S
        return self._looked_at is not None and self._monotonic() - self._looked_at < age_s

    @property
    def _is_stuck(self) -> bool:
        """Whether a look has been under way for so long that jobs are placed by the last one."""
        return self._looking_since is not None and self._monotonic() - self._looking_since > STUCK_S

    def freed(self, gone: Need) -> None:
        """A job is gone: the memory that it held on its card is free, so the last look is old."""
        if gone.on_gpu:
            self._looked_at = None
            self._freed += 1

    async def look(self, held: Callable[[], Iterable[Need]]) -> None:
        """Ask the driver again, one look at a time. One that does not answer leaves the cards as they were, their free memory
        unknown.
        """
        self.look_is_due = False
        if self._looking_since is not None:
            return
        self._looking_since, freed = self._monotonic(), self._freed
        busy = {each.card for each in held() if each.card is not None}
        try:
            now = await anyio.to_thread.run_sync(self._ask, limiter=self._looks, abandon_on_cancel=True)
        finally:
            self._looking_since = None
        if not now:
            log.warning("no driver tells of a GPU that jobs may use")
        before = self._machine.cards
        now = now or tuple(replace(card, free_bytes=None) for card in before)
        busy |= {each.card for each in held() if each.card is not None}  # it may have held memory at either end of the look
        self._machine = replace(self._machine, cards=looked_again(before, now, busy))
        self._looked_at = self._monotonic() if freed == self._freed else None

    def told(self, uuid: str | None) -> str:
        """A card, for people; empty for none."""
        return next((f"{card} {card.uuid}".strip() for card in self._machine.cards if card.uuid == uuid), uuid or "")

    def cards(self, on: Mapping[str, Need]) -> tuple[CardStatus, ...]:
        """Every card, with the jobs that were given it.

        Args:
            on: what is set aside, by job.
        """
        return tuple(
            CardStatus(
                uuid=card.uuid,
                index=card.index,
                name=card.name,
                memory_bytes=card.memory_bytes,
                free_bytes=card.free_bytes,
                jobs=tuple(job for job, each in on.items() if each.card == card.uuid),
            )
            for card in self._machine.cards
        )
