"""An actor in a process of its own, as the daemon sees it: spawned, awaited, listened to, stopped, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import anyio
import anyio.abc

from esperd.actors.activity import Activity, activity, belongs_to
from esperd.actors.cell import Cell, End, Post
from esperd.actors.codec import Head, Kind
from esperd.actors.dead_letters import Reason
from esperd.actors.envelope import Envelope
from esperd.actors.hub import Hub, Peer, Received
from esperd.actors.incarnation import SUPERVISOR, Incarnation
from esperd.actors.leaving import WHERE_SIGNAL
from esperd.actors.observer import TOLD, kind_of, result_name
from esperd.actors.outcome import error_reply
from esperd.actors.process import WorkerProcess, describe_status, spawn
from esperd.actors.shared import make_shared
from esperd.actors.sockets import is_remote
from esperd.actors.spec import ProcessSpec
from esperd.actors.stillness import SHARE, Stillness
from esperd.actors.supervisor import STOPPED
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, AskTimeout, Busy, EsperError, MalformedMessage, WorkerFailed
from esperd.messages import Done, Reply
from esperd.messages.control import BreakerStatus, Heartbeat, Stop, Watch

TERM_GRACE_S = 2.0
"""From SIGTERM to SIGKILL, after the actor's own grace has passed; chosen, not measured."""
WHERE_S = 1.0
"""What a process that hangs gets to print where its threads are, before it is killed; chosen, not measured."""
MAX_ASKS = 1_024
"""Unanswered asks of one process; more are refused with ``busy``."""


WORKING_PATIENCE = 5.0
"""Times the heartbeat timeout that a process may be silent that computes; chosen, not measured."""

AND_KILLED = "and was killed"
"""How the reason of an end says that it was the daemon that killed."""


class ProcessCell(Cell):
    """An actor behind the hub.

    Args:
        spec: how it is started.
        post: the system around it.
        hub: where it connects.
        token: of this run of the daemon.
    """

    def __init__(self, spec: ProcessSpec, post: Post, hub: Hub, token: str) -> None:
        super().__init__(spec, post)
        self._spec = spec
        self._hub = hub
        self._token = token
        self._worker: WorkerProcess | None = None
        self._peer: Peer | None = None
        self._fault = ""
        self._asks = 0

    @property
    def pid(self) -> int | None:
        """Of the process that said Ready; before that, of the one that was spawned."""
        if self._worker is None:
            return None
        said = self._peer.pid if self._peer is not None else None
        return said if said is not None else self._worker.pid

    @property
    def step(self) -> int | None:
        """As of its last heartbeat."""
        return self._peer.step if self._peer is not None else None

    @property
    def breakers(self) -> tuple[BreakerStatus, ...]:
        """As of its last heartbeat."""
        return self._peer.breakers if self._peer is not None else ()

    async def _live(self, generation: int, started: Callable[[], None]) -> End:
        made = None if is_remote(self._hub.endpoint) else make_shared(self.name)
        shared, inherited = made or (None, None)
        incarnation = Incarnation(
            hub=self._hub.endpoint,
            actor=self.name,
            generation=generation,
            token=self._token,
            heartbeat_interval_s=self._spec.heartbeat_interval_s,
            heartbeat_timeout_s=self._spec.heartbeat_timeout_s,
            shared=inherited,
        )
        self._fault = ""
        peer = self._hub.expect(incarnation, shared)
        try:
            worker = await spawn(self._spec, incarnation)
        except BaseException as error:
            self._hub.forget(peer)
            if not isinstance(error, WorkerFailed):
                raise
            return End(error.message, expected=False, error=error)
        self._worker, self._peer = worker, peer
        try:
            async with open_task_group() as tasks:
                tasks.start_soon(worker.relay_output)
                tasks.start_soon(self._stop_when_asked, worker, peer)
                tasks.start_soon(self._attend, worker, peer, started, tasks)
                status = await worker.wait()
                self.exit_status = status
                tasks.cancel_scope.cancel()
            await self._read_last_words(peer)
        finally:
            with anyio.CancelScope(shield=True):
                worker.kill()
                await worker.wait()
                await worker.close()
            self._hub.forget(peer)
            self._give_up_open(peer, worker.status)
            peer.inbox.close()
            self._worker = self._peer = None
        return self._end(worker, peer, status)

    def _give_up_open(self, peer: Peer, status: int | None) -> None:
        """Its process is gone: tell who waits for an answer; what it was told and never said to have handled is a dead letter.

        It may have handled the last of these: a process that is killed between a handler's end and the word of it cannot say so.
        """
        stopped = self._stop_requested.is_set() and not self._fault
        for envelope in peer.forget_open():
            if envelope.answer is not None:
                envelope.fail(self.stopped_error(), self.name)
            elif stopped:
                self._post.bury(Reason.ACTOR_STOPPED, self.name, envelope)
            else:
                how = "is gone" if status is None else describe_status(status)
                self._post.bury(Reason.PROCESS_DIED, self.name, envelope, f"its process {how}; it may have handled this")

    def _end(self, worker: WorkerProcess, peer: Peer, status: int) -> End:
        error: EsperError | None = None
        if self._fault:
            error = worker.failure(self._fault)
        elif self._stop_requested.is_set():
            return End(STOPPED, expected=True, error=None if peer.ready.is_set() else self.stopped_error())
        elif status != 0:
            error = worker.failure(describe_status(status))
        elif not peer.ready.is_set():
            error = worker.failure("exited before it was ready")
        else:
            return End("finished", expected=True)
        return End(error.message, expected=False, error=None if peer.ready.is_set() else error)

    async def _attend(self, worker: WorkerProcess, peer: Peer, started: Callable[[], None], tasks: anyio.abc.TaskGroup) -> None:
        """Wait for Ready, then pass messages both ways, until it is silent."""
        if why := await self._wait_for_ready(worker, peer):
            self._fault = f"{why} {AND_KILLED}"
            worker.kill()
            return
        started()
        tasks.start_soon(self._pass_in, peer, tasks)
        tasks.start_soon(self._pass_out, peer)
        if self._spec.stall_timeout_s > 0.0:
            tasks.start_soon(self._end_when_hung, worker, peer)
        silent_s = await self._until_silent(worker, peer)
        self._fault = f"was silent for {silent_s:g} s {AND_KILLED}"
        worker.kill()

    async def _wait_for_ready(self, worker: WorkerProcess, peer: Peer) -> str:
        """Return once it is ready, with nothing; or why it is not waited for any longer."""
        why = f"was not ready within {self._spec.start_timeout_s:g} s"

        async def give_up() -> None:
            nonlocal why
            why = await self._until_it_stands_still(worker, peer)
            waiting.cancel_scope.cancel()

        with anyio.move_on_after(self._spec.start_timeout_s):
            async with open_task_group() as waiting:
                waiting.start_soon(give_up)
                await peer.ready.wait()
                waiting.cancel_scope.cancel()
        return "" if peer.ready.is_set() else why

    async def _until_it_stands_still(self, worker: WorkerProcess, peer: Peer) -> str:
        """Return why a process that is starting will not be ready: it was stopped, or it beats no more and does nothing either.

        A silence alone says nothing yet: an import may hold the interpreter for longer than a heartbeat may take. One that
        never spoke may be a wrapper that waits for something far away: it has until its start's timeout.
        """
        interval_s, timeout_s = self._spec.heartbeat_interval_s, self._spec.heartbeat_timeout_s
        before: tuple[float, Activity | None] = (peer.heard_at, activity(worker.pid))
        still_s = 0.0
        while still_s < timeout_s:
            await self._post.clock.sleep(interval_s)
            now = (peer.heard_at, activity(worker.pid))
            stands_still = now == before and now[1] is not None and (now[1].stopped or (peer.spoke and not now[1].runs))
            # Looks are counted, and not time: the daemon, or the machine, may have been the one that slept.
            still_s = still_s + interval_s if stands_still else 0.0
            before = now
        return f"stood still for {timeout_s:g} s before it was ready"

    async def _until_silent(self, worker: WorkerProcess, peer: Peer) -> float:
        """Return once it was silent for too long, with how long that is.

        One that computes meanwhile, or waits for its turn on a busy machine, is given more time: another in its place would have
        to import everything again, and make the machine busier still.
        """
        clock, timeout_s = self._post.clock, self._spec.heartbeat_timeout_s
        before: Activity | None = None
        while True:
            silent_s = clock.monotonic() - peer.heard_at
            if silent_s < timeout_s:
                await clock.sleep(timeout_s - silent_s)
                before = activity(worker.pid)
                continue
            # The daemon may have been the one that slept: let the hub read what is queued before judging.
            await clock.sleep(self._spec.heartbeat_interval_s)
            now = activity(worker.pid)
            works = now is not None and before is not None and (now.runs or now.work != before.work)
            longest_s = timeout_s * (WORKING_PATIENCE if works else 1.0)
            if clock.monotonic() - peer.heard_at >= longest_s:
                return longest_s
            before = now

    async def _end_when_hung(self, worker: WorkerProcess, peer: Peer) -> None:
        """Kill a process that beats and does nothing else. Whoever waits for an answer of ours is not judged meanwhile."""
        if peer.pid is None or not belongs_to(peer.pid, worker.pid):
            return  # what was spawned only speaks for it, from another machine or container: what it does cannot be seen
        stillness = Stillness(self._spec.stall_timeout_s)
        hung = False
        while not hung:
            await self._post.clock.sleep(stillness.every_s)
            now = activity(worker.pid)
            occupied = self._asks > 0 or (now is not None and now.runs)
            hung = stillness.look(peer.step, now.cpu_s if now is not None else None, occupied=occupied)
        still_s = stillness.still_s
        at = "before its first step" if peer.step is None else f"at step {peer.step}"
        self._fault = (
            f"hung {AND_KILLED}: it stood {at} for {still_s:g} s and used less than {SHARE:.0%} of a processor; where that "
            "is no fault, raise workers.stall_timeout_s (0: never)"
        )
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(peer.pid, WHERE_SIGNAL)
            await self._post.clock.sleep(WHERE_S)
        worker.kill()

    async def _stop_when_asked(self, worker: WorkerProcess, peer: Peer) -> None:
        await self._stop_requested.wait()
        if peer.ready.is_set():
            try:
                with anyio.move_on_after(self.grace_s):
                    await self._hub.send(peer, Envelope(Stop(), SUPERVISOR), None)
            except ActorUnavailable:
                worker.terminate()  # it closed its connection: what reaches it now are signals
            await self._post.clock.sleep(self.grace_s)
        worker.terminate()
        await self._post.clock.sleep(TERM_GRACE_S)
        worker.kill()

    async def _pass_out(self, peer: Peer) -> None:
        """Mailbox → process."""
        while isinstance(envelope := await self.mailbox.get(), Envelope):
            self._post.observer.observe_wait(self.name, time.perf_counter() - envelope.sent_at)
            if envelope.is_abandoned:
                self._post.bury(Reason.EXPIRED, self.name, envelope)
                continue
            try:
                await self._hub.send(peer, envelope, _remaining_ms(envelope))
            except MalformedMessage as error:
                self._post.bury(Reason.UNENCODABLE, self.name, envelope, error.message)
            except ActorUnavailable as error:
                self._post.bury(Reason.ACTOR_STOPPED, self.name, envelope, error.message)
            else:
                self.handled += 1
                if envelope.answer is None:
                    self._post.observer.observe_message(self.name, kind_of(envelope.message), TOLD)

    async def _pass_in(self, peer: Peer, tasks: anyio.abc.TaskGroup) -> None:
        """Process → whoever it names, in its order. Answers go back as they come."""
        while True:
            await self._pass_one_in(peer, await peer.inbox.get(), tasks)

    async def _pass_one_in(self, peer: Peer, received: Received, tasks: anyio.abc.TaskGroup) -> None:
        head, message = received
        if head.kind is not Kind.ASK:
            await self._post.deliver(head.to, Envelope(message, self.name, trace=head.trace))
            return
        if head.to == SUPERVISOR:
            await self._answer(peer, head.id, self._answer_supervision(received))
            return
        if self._asks >= MAX_ASKS:
            busy = Busy(f"{self.name} waits for {self._asks} answers already", actor=self.name, retry_after_s=0.1)
            await self._answer(peer, head.id, error_reply(busy, actor=head.to, message=message))
            return
        loop = asyncio.get_running_loop()
        patience_s = None if head.deadline_ms is None else head.deadline_ms / 1000
        deadline = None if patience_s is None else loop.time() + patience_s
        envelope = Envelope(message, self.name, loop.create_future(), deadline, head.trace)
        try:
            with anyio.move_on_after(patience_s):
                await self._post.deliver(head.to, envelope)
        except EsperError as error:
            self._post.observer.observe_message(head.to, kind_of(message), error.code)
            await self._answer(peer, head.id, error_reply(error, actor=head.to, message=message))
            return
        self._asks += 1
        tasks.start_soon(self._await_answer, peer, head, envelope, patience_s)

    async def _await_answer(self, peer: Peer, head: Head, envelope: Envelope, patience_s: float | None) -> None:
        answer = envelope.answer
        if answer is None:
            return
        result = AskTimeout.code
        try:
            with anyio.move_on_after(patience_s):  # past it, the process has given up by itself
                reply = await answer
                result = result_name(reply)
                await self._answer(peer, head.id, reply)
            self._post.observer.observe_message(head.to, kind_of(envelope.message), result)
        finally:
            self._asks -= 1
            answer.cancel()

    def _answer_supervision(self, received: Received) -> Reply:
        """An ask to the supervisor. A heartbeat that is asked is a flush: everything said before it has been passed on."""
        message = received.message
        if isinstance(message, Heartbeat):
            return Done()
        if isinstance(message, Watch):
            try:
                self._post.watch(message.actor, self.name)
            except EsperError as error:
                return error_reply(error, actor=SUPERVISOR, message=message)
            return Done()
        unknown = MalformedMessage(
            f"the supervisor answers Ready, Heartbeat and Watch; it was asked {type(message).__name__}",
            message_type=type(message).__name__,
        )
        return error_reply(unknown, actor=SUPERVISOR, message=message)

    async def _answer(self, peer: Peer, request: int, reply: Reply) -> None:
        try:
            await self._hub.answer(peer, request, reply)
        except ActorUnavailable:
            return  # it left before its answer came; its end is noticed by itself

    async def _read_last_words(self, peer: Peer) -> None:
        """What it told before it ended, and the hub has read, still reaches whom it was for; its asks have no asker."""
        while peer.inbox.statistics().depth:
            head, message = await peer.inbox.get()
            if head.kind is Kind.TELL:
                await self._post.tell(head.to, message, sender=self.name)


def _remaining_ms(envelope: Envelope) -> int | None:
    if envelope.deadline is None:
        return None
    return max(0, int((envelope.deadline - asyncio.get_running_loop().time()) * 1000))
