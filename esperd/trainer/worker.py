"""The trainer's process: takes one lease, trains it, says how it ended. ``python -m esperd.trainer.worker``, by the daemon.

The training loop runs in the main thread and never awaits; the link to the daemon beats in a thread of its own, so a long
step is not mistaken for a dead worker. It beats before torch is imported: a worker that is stopped while it starts is noticed
as soon as one that trains.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog

from esperd import tracing
from esperd.actors.leaving import leave, tell_where_it_hangs
from esperd.actors.threadlink import ThreadLink
from esperd.config import Telemetry, load_config
from esperd.errors import ConfigError, DaemonUnreachable, StoreFailed
from esperd.logs import configure_logging
from esperd.messages.leases import EXIT_NO_FAULT, Lease
from esperd.trainer.link_desk import DAEMON_TROUBLE, LinkDesk

LOOK_S = 0.5
"""How often a worker without a lease looks whether its daemon is still there."""
LEASE_TIMEOUT_S = 60.0
"""How long it waits for one. Whoever started it hands it over at once, so after this nobody knows of this worker."""

log = structlog.get_logger()


def main() -> int:
    """Train one lease.

    Returns:
        0 when the job's end was reported, or no lease came; 75 when the daemon was lost or could not be told, or the disk
        would not take the artifacts.
    """
    config = load_config()
    configure_logging(config.daemon.log_level)
    tell_where_it_hangs()
    desks: list[LinkDesk] = []
    link = ThreadLink(
        step=lambda: desks[0].step if desks else None,
        breakers=lambda: desks[0].breakers() if desks else (),
        starting=True,
    )
    with link:
        from esperd.trainer.attempt import train  # torch comes with it: the process says that it lives before

        try:
            link.say_ready()
        except DaemonUnreachable as error:  # it is gone, or cut off: what the job is like nobody knows yet
            log.warning("left before it was ready", error=str(error))
            return EXIT_NO_FAULT
        lease = _await_lease(link)
        if lease is None:
            return 0
        desk = LinkDesk(link, lease, breakers=config.breakers)
        desks.append(desk)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: desk.drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        structlog.contextvars.bind_contextvars(
            actor=link.name, generation=link.generation, job=lease.job_id, attempt=lease.generation
        )
        try:
            with _traced(config.telemetry, lease):
                with tracing.span("trainer attempt", parent=lease.trace, job=lease.job_id, attempt=lease.generation):
                    ended = train(desk, lease)
                desk.record_rest()
                desk.report(ended)  # before the last spans are sent: the job is over, wherever its collector is
        except (*DAEMON_TROUBLE, StoreFailed) as error:
            log.warning("left through no fault of the job", job=lease.job_id, code=error.code, error=str(error))
            return EXIT_NO_FAULT
    return 0


def _traced(settings: Telemetry, lease: Lease) -> AbstractContextManager[None]:
    """Send spans, where somebody traces the job. A job's own ``python`` may lack what its daemon has: it trains untraced."""
    if not settings.otlp_endpoint or not tracing.is_sampled(lease.trace):
        return contextlib.nullcontext()
    try:
        tracing.require_collector(settings.otlp_endpoint)
    except ConfigError as error:
        log.warning("not traced", error=str(error))
        return contextlib.nullcontext()
    return tracing.exporting(settings.otlp_endpoint, "esperd trainer", every_step=settings.trace_steps)


def _await_lease(link: ThreadLink, clock: Callable[[], float] = time.monotonic) -> Lease | None:
    """The lease; None when the daemon wants this process to end, is gone, or has forgotten it, before it gave one."""
    give_up_at = clock() + LEASE_TIMEOUT_S
    while not link.daemon_lost and clock() < give_up_at:
        try:
            message = link.received.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        return message if isinstance(message, Lease) else None
    return None


if __name__ == "__main__":
    leave(main())
