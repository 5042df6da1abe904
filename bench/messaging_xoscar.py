"""The actor of xoscar in ``messaging.py``; run as a program, a pool that serves it to other processes."""

from __future__ import annotations

import asyncio

import uvloop
import xoscar


class Echo(xoscar.Actor):
    """Takes bytes, gives nothing."""

    async def echo(self, body: bytes) -> None:
        """Take them."""


async def serve() -> None:
    """Serve until killed; the first line says where."""
    pool = await xoscar.create_actor_pool("127.0.0.1", n_process=0)
    async with pool:
        await xoscar.create_actor(Echo, address=pool.external_address, uid="echo")
        print(pool.external_address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
