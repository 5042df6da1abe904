"""Programs that the process tests start: a served actor, a training loop on a thread link, and some that misbehave."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from typing import NoReturn

import anyio

from esperd.actors import shared
from esperd.actors.actor import Actor, Context, handles
from esperd.actors.codec import OUT_OF_BAND_BYTES
from esperd.actors.serve import serve_actor
from esperd.actors.threadlink import ThreadLink
from esperd.errors import Busy, EsperError, JobNotFound
from esperd.messages import Done, Reply
from esperd.messages.control import ActorList, BreakerState, BreakerStatus, Heartbeat, ListActors, ListPlugins, Stop, Terminated
from esperd.messages.jobs import ArtifactChunk, GetJob, ListJobs
from esperd.messages.leases import StopJob


class Served(Actor):
    """Does to itself what a test asks for."""

    async def on_start(self, context: Context) -> None:
        self.context = context
        self.release = anyio.Event()
        if "fail-start" in sys.argv:
            raise RuntimeError("cannot start")
        if "watch" in sys.argv:
            await context.watch("recorder")

    async def on_stop(self) -> None:
        await self.context.tell("recorder", Heartbeat(actor="stopped", generation=self.context.generation))

    @handles(ListActors)
    async def ask_back(self, message: ListActors) -> Reply:
        return await self.context.ask("recorder", message)

    @handles(ListPlugins)
    async def where(self, message: ListPlugins) -> Reply:
        return ActorList(actors=(), dead_letters={"pid": os.getpid(), "generation": self.context.generation})

    @handles(Heartbeat)
    async def pass_on(self, message: Heartbeat) -> None:
        if message.actor == "crash":
            raise ValueError("told to crash")
        if message.actor == "busy":
            raise Busy("told to be busy")
        if message.actor == "release":
            self.release.set()
        await self.context.tell("recorder", message)

    @handles(ArtifactChunk)
    async def echo(self, message: ArtifactChunk) -> Reply:
        return message

    @handles(Terminated)
    async def mourn(self, message: Terminated) -> None:
        await self.context.tell("second", Heartbeat(actor=message.actor, generation=message.generation))

    @handles(ListJobs, concurrent=2)
    async def hold(self, message: ListJobs) -> None:
        await self.context.tell("recorder", Heartbeat(actor="holding", generation=1))
        await self.release.wait()

    @handles(GetJob)
    async def obey(self, message: GetJob) -> Reply | None:
        match message.id:
            case "typed":
                raise JobNotFound("no such job", id="typed")
            case "bug":
                raise ValueError("a bug")
            case "exit":
                sys.stderr.write("these were my last words\n")
                sys.stderr.flush()
                os._exit(3)
            case "stall":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hold":
                await self.context.tell("recorder", Heartbeat(actor="holding", generation=1))
                await anyio.sleep_forever()
            case "thread":
                await anyio.to_thread.run_sync(time.sleep, 1.0)
            case "computes":
                until = time.monotonic() + 1.0
                while time.monotonic() < until:  # on the event loop: nothing beats meanwhile
                    sum(range(100_000))
        return None


def make() -> Served:
    """What imports before it is ready look like."""
    if "slow-start" in sys.argv:
        time.sleep(1.0)
        sum(range(40_000_000))  # holds the interpreter, as loading a large library does: no thread can beat meanwhile
    if "stop-at-start" in sys.argv:
        os.kill(os.getpid(), signal.SIGSTOP)
    return Served()


def train() -> None:
    """What a trainer's main looks like."""
    steps = [0]
    breaker = BreakerStatus(service="policy", state=BreakerState.OPEN, failures=3, opened=1, retry_after_s=9.0)
    with ThreadLink(step=lambda: steps[0], breakers=lambda: (breaker,)) as link:
        link.tell("recorder", Heartbeat(actor="before", generation=link.generation))
        reply = link.ask("recorder", ListActors())
        assert isinstance(reply, ActorList)
        try:
            link.ask("nobody", ListActors())
        except EsperError as error:
            link.tell("recorder", Heartbeat(actor=error.code, generation=0))
        while True:
            steps[0] += 1
            try:
                order = link.received.get(timeout=0.02)
            except queue.Empty:
                if link.daemon_lost:
                    sys.stderr.write("daemon lost\n")
                    os._exit(0)
                continue
            if isinstance(order, StopJob):
                link.tell("recorder", Heartbeat(actor=f"stop {order.why}", generation=0, step=steps[0]))
            if isinstance(order, Stop):
                assert isinstance(link.ask("recorder", GetJob(id="x")), Done)
                return


def stay_away() -> NoReturn:
    """Never connects."""
    print("importing something slow", flush=True)
    while True:
        time.sleep(60)


def chatter() -> NoReturn:
    """Prints without end and never connects."""
    while True:
        print("x" * 10_000, flush=True)


def fall_silent() -> NoReturn:
    """Closes whatever it could print to, the inherited reading end included, and never connects."""
    os.closerange(0, 64)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    match sys.argv[1]:
        case "serve":
            if "share" in sys.argv:
                shared.SHARED_BYTES = OUT_OF_BAND_BYTES
            serve_actor(make)
        case "train":
            train()
        case "stay-away":
            stay_away()
        case "chatter":
            chatter()
        case "fall-silent":
            fall_silent()
        case "exit":
            print("nothing to do")
