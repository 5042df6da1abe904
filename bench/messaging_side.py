"""One system's side of ``messaging.py``: ``messaging_side.py SYSTEM PATH SECONDS`` prints its figures as JSON.

Everybody does the same: an actor takes a request of 100 B or 1 MB and gives a small answer; 1 or 64 requests are in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from queue import Empty

SIZES = {"100B": 100, "1MB": 1_000_000}
IN_FLIGHT = (1, 64)
WARM_UP = 20
LEAST = 20
"""Requests measured at least, however slow."""

Call = Callable[[bytes], Awaitable[object]]


def told(latencies: list[float], wall_s: float) -> dict[str, float]:
    """Median and 99th percentile in microseconds, requests per second."""
    ordered = sorted(latencies)
    return {
        "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
        "rate": len(ordered) / wall_s,
    }


def tell(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Print what was found, before anything is torn down: a peer that fails in that has been measured."""
    print(json.dumps(found), flush=True)
    return found


async def measured(call: Call, seconds: float) -> dict[str, dict[str, float]]:
    """Every size and number in flight."""
    found = {}
    for label, size in SIZES.items():
        body = bytes(size)
        for _ in range(WARM_UP):
            await call(body)
        for in_flight in IN_FLIGHT:
            found[f"{label}/{in_flight}"] = await _case(call, body, in_flight, seconds)
    return tell(found)


async def _case(call: Call, body: bytes, in_flight: int, seconds: float) -> dict[str, float]:
    latencies: list[float] = []
    began = time.perf_counter()

    async def asking() -> None:
        while time.perf_counter() - began < seconds or len(latencies) < LEAST:
            at = time.perf_counter()
            await call(body)
            latencies.append(time.perf_counter() - at)

    await asyncio.gather(*(asking() for _ in range(in_flight)))
    return told(latencies, time.perf_counter() - began)


def measured_blocking(
    ask: Callable[[bytes], object], begin: Callable[[bytes], object], finish: Callable[[object], object], seconds: float
) -> dict[str, dict[str, float]]:
    """The same for a system without an event loop: ``begin`` starts a request, ``finish`` waits for its answer."""
    found = {}
    for label, size in SIZES.items():
        body = bytes(size)
        for _ in range(WARM_UP):
            ask(body)
        for in_flight in IN_FLIGHT:
            latencies: list[float] = []
            began = time.perf_counter()
            flying: list[tuple[float, object]] = []
            while time.perf_counter() - began < seconds or len(latencies) < LEAST:
                while len(flying) < in_flight:
                    at = time.perf_counter()
                    flying.append((at, begin(body)))
                at, handle = flying.pop(0)
                finish(handle)
                latencies.append(time.perf_counter() - at)
            wall_s = time.perf_counter() - began
            for _, handle in flying:
                finish(handle)
            found[f"{label}/{in_flight}"] = told(latencies, wall_s)
    return tell(found)


# --- esperd --------------------------------------------------------------------------------------------------------------


async def esperd_in_process(seconds: float) -> dict[str, dict[str, float]]:
    """``ActorSystem.ask``: bounded mailbox, typed errors, timeout, generations."""
    import messaging_esperd as own

    from esperd.actors.spec import ChildSpec
    from esperd.actors.system import ActorSystem

    async with ActorSystem() as system:
        await system.start(ChildSpec("echo", own.Echo))
        return await measured(lambda body: system.ask("echo", own.Request(body=body)), seconds)


def esperd_between(path: str) -> Callable[[float], Awaitable[dict[str, dict[str, float]]]]:
    """``RequestClient`` here, ``RequestServer`` in a process of its own."""

    async def measure(seconds: float) -> dict[str, dict[str, float]]:
        import messaging_esperd as own

        from esperd.actors.keys import new_pair, write_public

        with tempfile.TemporaryDirectory(prefix="esperd-bench-") as directory:
            endpoint = f"ipc://{directory}/s" if path == "ipc" else own.free_tcp_endpoint()
            command = [sys.executable, str(Path(own.__file__)), endpoint]
            keys = None
            if path == "curve":
                keys = new_pair()
                write_public(Path(directory) / "bench.pub", keys.public)
                command.append(directory)
            with serving(command) as server_key:
                async with own.client(endpoint, keys, server_key) as client:
                    return await measured(lambda body: client.request(own.Request(body=body)), seconds)

    return measure


@contextlib.contextmanager
def serving(command: list[str]) -> Generator[str, None, None]:
    """A server in another process; gives the first line it prints, which says that it serves."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline().strip()
            if not line:
                raise SystemExit(f"{' '.join(command)} did not start")
            yield line
        finally:
            server.kill()


# --- peers ---------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def xoscar_pool(path: str) -> AsyncGenerator[Call, None]:
    import messaging_xoscar as peer
    import xoscar

    if path == "tcp":
        with serving([sys.executable, str(Path(peer.__file__))]) as address:
            actor = await xoscar.actor_ref(address, "echo")
            yield actor.echo
        return
    pool = await xoscar.create_actor_pool("127.0.0.1", n_process=0 if path == "in-process" else 1)
    async with pool:
        address = pool.external_address if path == "in-process" else next(iter(pool.sub_processes))
        actor = await xoscar.create_actor(peer.Echo, address=address, uid="echo")
        yield actor.echo


def xoscar_over(path: str) -> Callable[[float], Awaitable[dict[str, dict[str, float]]]]:
    async def measure(seconds: float) -> dict[str, dict[str, float]]:
        async with xoscar_pool(path) as call:
            return await measured(call, seconds)

    return measure


def pykka_in_process(seconds: float) -> dict[str, dict[str, float]]:
    import pykka

    class Echo(pykka.ThreadingActor):
        def on_receive(self, message: bytes) -> None:
            """Take it."""
            del message

    actor = Echo.start()
    try:
        return measured_blocking(actor.ask, lambda body: actor.ask(body, block=False), lambda future: future.get(), seconds)
    finally:
        actor.stop()


def thespian_over(base: str) -> Callable[[float], dict[str, dict[str, float]]]:
    def measure(seconds: float) -> dict[str, dict[str, float]]:
        import messaging_thespian as peer
        from thespian.actors import ActorSystem

        system = ActorSystem(base)
        try:
            actor = system.createActor(peer.Echo)

            def finish(_: object) -> object:
                answer = system.listen(10)
                if answer is None:
                    raise Empty
                return answer

            return measured_blocking(
                lambda body: system.ask(actor, body, 10), lambda body: system.tell(actor, body), finish, seconds
            )
        finally:
            system.shutdown()

    return measure


def ray_process(seconds: float) -> dict[str, dict[str, float]]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    @ray.remote
    class Echo:
        def echo(self, body: bytes) -> None:
            """Take it."""
            del body

    actor = Echo.remote()
    try:
        return measured_blocking(lambda body: ray.get(actor.echo.remote(body)), actor.echo.remote, ray.get, seconds)
    finally:
        ray.shutdown()


SIDES = {
    ("pykka", "in-process"): pykka_in_process,
    ("esperd", "in-process"): esperd_in_process,
    ("xoscar", "in-process"): xoscar_over("in-process"),
    ("thespian", "in-process"): thespian_over("simpleSystemBase"),
    ("esperd", "ipc"): esperd_between("ipc"),
    ("xoscar", "ipc"): xoscar_over("ipc"),
    ("esperd", "tcp"): esperd_between("tcp"),
    ("xoscar", "tcp"): xoscar_over("tcp"),
    ("esperd", "curve"): esperd_between("curve"),
    ("ray", "tcp"): ray_process,
    ("thespian", "tcp"): thespian_over("multiprocTCPBase"),
}
"""In the order they run: who is compared runs close together, because a machine is not equally fast all the time. Ray's actors
are processes and speak gRPC over TCP, on one machine too."""


def main() -> None:
    """Measure one system on one path."""
    system, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    side = SIDES[system, path]
    if not asyncio.iscoroutinefunction(side):
        side(seconds)
    else:
        import uvloop

        uvloop.run(side(seconds))


if __name__ == "__main__":
    main()
