"""Two hosts on one machine: network namespaces with a line between them that can be cut. Needs root, or what stands in for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from esperd.actors.keys import AllowList, create_pair
from esperd.config import Config, Network

NEAR, FAR = "10.99.61.1", "10.99.61.2"
"""Addresses of the two hosts; each namespace has them to itself."""
START_S = 20.0
FAR_WORKER = """#!/bin/sh
# A worker on the other host: whoever ends this process here does not end it there.
export ESPERD_HUB="{hub}"
setsid ip netns exec {far} {python} "$@" &
wait $!
"""


@dataclass(frozen=True)
class FarAccess:
    """What a client on the far host needs to reach its daemon; made by :func:`open_to_far`."""

    listen: str
    server_key: str
    client_key: Path


def open_to_far(state: Path, keys: Path, config: Config) -> tuple[Config, FarAccess]:
    """Let a daemon on the near host serve the far one: keys of both, and the configuration that listens there.

    Args:
        state: of the daemon; made.
        keys: where the client's key goes; made.
        config: what else the daemon is told.
    """
    keys.mkdir()
    server, mine = create_pair(keys / "server.key"), create_pair(keys / "mine.key")
    (state / "keys").mkdir(parents=True)
    shutil.copy(keys / "server.key", state / "keys" / "server.key")
    AllowList(state / "keys" / "allowed").allow("mine", mine.public)
    network = Network(listen=f"tcp://{NEAR}:7411", events=f"tcp://{NEAR}:7412")
    access = FarAccess(network.listen, server.public.hex(), keys / "mine.key")
    return msgspec.structs.replace(config, network=network), access


class NoNamespaces(Exception):
    """This machine lets nobody make network namespaces; the message is what it said."""


@dataclass(frozen=True)
class TwoHosts:
    """Made by :func:`two_hosts`. Both see the same files, as over a network file system."""

    near: str
    far: str
    line: str

    def cut(self) -> None:
        """From now on nothing arrives, in either direction; nobody is told."""
        _ip("-n", self.line, "link", "set", "line", "down")

    def heal(self) -> None:
        """The line carries again."""
        _ip("-n", self.line, "link", "set", "line", "up")

    def near_python(self, folder: Path) -> Path:
        """An interpreter whose processes run on the near host."""
        return _program(folder / "near-python", f'#!/bin/sh\nexec ip netns exec {self.near} {sys.executable} "$@"\n')

    def far_python(self, folder: Path, hub: str) -> Path:
        """An interpreter for a job's workers, which run on the far host and reach their daemon at ``hub``."""
        return _program(folder / "far-python", FAR_WORKER.format(hub=hub, far=self.far, python=sys.executable))

    @contextlib.contextmanager
    def on(self, host: str, *command: str, **options: str) -> Iterator[subprocess.Popen[str]]:
        """A Python program on one of the hosts, for as long as the block lasts.

        Args:
            host: ``near`` or ``far``, as the attributes say.
            command: arguments of the interpreter.
            options: variables of its environment.
        """
        full = ["ip", "netns", "exec", host, sys.executable, *command]
        environment = {**os.environ, **options}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(full, text=True, env=environment, **pipes) as process:  # noqa: S603 - our own
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def tunnel(self, folder: Path, socket: Path, port: int = 7001, **options: str) -> Iterator[str]:
        """A way from the far host to a socket of the near one; the block gets the endpoint on the far host."""
        far = folder / "far.sock"
        relay = ("-m", "esperd_chaos.relay")
        with (
            self.on(self.near, *relay, f"tcp:{NEAR}:{port}", f"unix:{socket}", **options) as here,
            self.on(self.far, *relay, f"unix:{far}", f"tcp:{NEAR}:{port}", **options) as there,
        ):
            for process in (here, there):
                if process.stdout is None or process.stdout.readline() != "listening\n":
                    raise RuntimeError("a relay did not start")
            yield f"ipc://{far}"
        far.unlink(missing_ok=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts and the line between them, for as long as the block lasts.

    Raises:
        NoNamespaces: when this machine does not let us.
    """
    hosts = TwoHosts(*(f"esperd-{os.getpid()}-{name}" for name in ("near", "far", "line")))
    names = (hosts.near, hosts.far, hosts.line)
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("-n", hosts.line, "link", "add", "line", "type", "bridge")
            for name, address, port in ((hosts.near, NEAR, "near"), (hosts.far, FAR, "far")):
                _ip("-n", hosts.line, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("-n", hosts.line, "link", "set", port, "master", "line")
                _ip("-n", hosts.line, "link", "set", port, "up")
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "link", "set", "lo", "up")
            hosts.heal()
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            raise NoNamespaces(f"no network namespaces here: {said}") from error
        yield hosts
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):  # it was not made
                _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)  # noqa: S603, S607 - wherever it is installed


def _program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path
