"""The HTTP side port: /livez, /readyz, /metrics and /v1/status, on loopback unless configured otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from esperd.config import Http
from esperd.daemon.listening import cannot_listen
from esperd.daemon.status import DaemonStatus
from esperd.telemetry.metrics import Metrics

MOST_CONNECTIONS = 64
"""At one time; whoever comes then is disconnected at once. Every connection takes a descriptor, and libzmq ends the process when
there is none. Chosen, not measured."""
REQUEST_S = 10.0
"""How long a connection may take for its next request, and to read the answer; then it is closed. Chosen, not measured."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """One that ends when nothing comes of it: uvicorn would hold one that never asks, or never reads, for ever."""

    _over: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn narrows it as well
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._wait()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a request: its answer has its own time
            self._wait()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._end_wait()
        self._over = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _end_wait(self) -> None:
        if self._over is not None:
            self._over.cancel()


def build_app(metrics: Metrics, not_ready: Callable[[], list[str]], status: Callable[[], DaemonStatus]) -> Starlette:
    """The application.

    Args:
        metrics: rendered at /metrics.
        not_ready: reasons why the daemon cannot take work; none means ready.
        status: answered at /v1/status.
    """

    async def livez(_request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(_request: Request) -> Response:
        reasons = not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)

    async def render(_request: Request) -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    async def tell(_request: Request) -> Response:
        return Response(msgspec.json.encode(status()), media_type="application/json")

    return Starlette(
        routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", render), Route("/v1/status", tell)]
    )


def bind(settings: Http) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address cannot be bound; names it.
        AddressUnavailable: it cannot be bound now: it is taken, or not up yet.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        where = f"http address {settings.host}:{settings.port} cannot be bound"
        another = "set http.port to another one, or to 0 for any free port"
        raise cannot_listen(where, error, another=another, key="http.port") from error
    return listening


@contextlib.asynccontextmanager
async def serving(listening: socket.socket, app: Starlette) -> AsyncIterator[int]:
    """Serve the application on a bound socket until the block ends; yields the port."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", http=_Connection)
    server = _Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listening])
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
