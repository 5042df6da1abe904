"""The HTTP side port: /livez, /readyz, /metrics and /v1/status, on loopback unless configured otherwise."""

from __future__ import annotations

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

from esperd.config import Http
from esperd.daemon.status import DaemonStatus
from esperd.errors import ConfigError
from esperd.telemetry.metrics import Metrics


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
    """
    listening = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"http address {settings.host}:{settings.port} cannot be bound: {error.strerror}; "
            "set http.port to another one, or to 0 for any free port",
            key="http.port",
        ) from error
    return listening


@contextlib.asynccontextmanager
async def serving(listening: socket.socket, app: Starlette) -> AsyncIterator[int]:
    """Serve the application on a bound socket until the block ends; yields the port."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
    server = _Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listening])
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
