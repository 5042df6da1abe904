"""Bytes from one socket to another, as a tunnel carries them: ``python -m esperd_chaos.relay LISTEN TARGET``.

Each is ``unix:PATH`` or ``tcp:HOST:PORT``. A worker reaches a daemon on another host through two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def relay(listen: str, target: str) -> None:
    """Carry bytes for ever; a connection whose other end is gone is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await _connect(target)
            with contextlib.closing(far_writer):
                both = [asyncio.create_task(_carry(reader, far_writer)), asyncio.create_task(_carry(far_reader, writer))]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)

    kind, _, where = listen.partition(":")
    if kind == "unix":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(where)  # noqa: PTH108 - of an earlier relay
        server = await asyncio.start_unix_server(serve, where)
    else:
        host, _, port = where.rpartition(":")
        server = await asyncio.start_server(serve, host, int(port))
    print("listening", flush=True)
    await server.serve_forever()


async def _connect(target: str) -> Streams:
    kind, _, where = target.partition(":")
    if kind == "unix":
        return await asyncio.open_unix_connection(where)
    host, _, port = where.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


if __name__ == "__main__":
    asyncio.run(relay(*sys.argv[1:3]))
