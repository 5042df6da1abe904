"""Addresses: which errors may pass; and the HTTP side port, which holds nobody's connection for ever."""

from __future__ import annotations

import errno
import socket

import anyio
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from esperd.config import Http
from esperd.daemon import http
from esperd.daemon.http import bind, build_app, serving
from esperd.daemon.listening import cannot_listen
from esperd.errors import AddressUnavailable, ConfigError
from esperd.telemetry.metrics import Metrics

ASKED = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"


@pytest.mark.parametrize(
    ("number", "error_class", "told"),
    [
        (errno.EADDRNOTAVAIL, AddressUnavailable, "no interface that is up has this address"),
        (errno.ENODEV, AddressUnavailable, "no interface that is up has this address"),
        (errno.EADDRINUSE, AddressUnavailable, "end what listens there, or choose another"),
        (errno.EMFILE, AddressUnavailable, "another try may find otherwise"),
        (errno.EACCES, ConfigError, "choose another"),
        (socket.EAI_NONAME, ConfigError, "choose another"),
    ],
)
def test_what_may_pass_is_no_mistake_in_a_configuration(number, error_class, told):
    error = cannot_listen("network.listen", OSError(number, "why"), another="choose another", key="network.listen")
    assert type(error) is error_class
    assert error.exit_status == (2 if error_class is ConfigError else 1)  # 2 is not tried again by systemd
    assert error.message.startswith("network.listen: why")
    assert told in error.message
    assert ("choose another" in error.message) == (told.endswith("choose another"))


def test_an_address_that_is_not_up_is_told_as_that():
    with pytest.raises(AddressUnavailable, match="no interface that is up"):
        bind(Http(host="203.0.113.7", port=0))  # TEST-NET-3 (RFC 5737), which nobody has


async def ends(stream):
    with anyio.fail_after(10), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
        await stream.receive()


@pytest.mark.asyncio
async def test_connections_of_the_side_port_are_counted_and_end_when_nothing_comes_of_them(monkeypatch):
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(http, "REQUEST_S", 600.0)
    async with serving(bind(Http(port=0)), build_app(Metrics(), list, dict)) as port:

        def come():
            return anyio.connect_tcp("127.0.0.1", port)

        async with await come() as first, await come() as second:
            for served in (first, second):
                await served.send(ASKED)
                assert b"alive" in await served.receive()
            async with await come() as one_too_many:
                await ends(one_too_many)

        monkeypatch.setattr(http, "REQUEST_S", 0.3)
        async with await come() as silent, await come() as half:
            await half.send(ASKED)
            assert b"alive" in await half.receive()
            await half.send(ASKED[:10])
            await ends(silent)
            await ends(half)
        async with await come() as another:
            await another.send(ASKED)
            assert b"alive" in await another.receive()


@pytest.mark.asyncio
async def test_an_answer_has_its_own_time_however_late_its_request_came(monkeypatch):
    monkeypatch.setattr(http, "REQUEST_S", 2.0)
    app = build_app(Metrics(), list, dict)

    async def slow(_request):
        await anyio.sleep(0.8)
        return PlainTextResponse("at last")

    app.router.routes.append(Route("/slow", slow))
    async with serving(bind(Http(port=0)), app) as port, await anyio.connect_tcp("127.0.0.1", port) as late:
        await anyio.sleep(1.5)
        await late.send(ASKED.replace(b"/livez", b"/slow"))
        assert b"at last" in await late.receive()
