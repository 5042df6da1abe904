"""Clients from beyond the runtime directory: the same front door on a TCP port, behind keys and an allow-list."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import anyio
import anyio.abc
import msgspec
import structlog
import zmq

from esperd.actors.clock import Clock
from esperd.actors.curve import Gate, ServerSecurity
from esperd.actors.keys import AllowList, open_pair, read_pair
from esperd.actors.limits import ClientLimits, TokenBucket, Turnstile
from esperd.actors.publication import Publisher
from esperd.actors.requests import RequestServer
from esperd.actors.tasks import open_task_group
from esperd.config import Config, Network
from esperd.daemon.listening import cannot_listen
from esperd.errors import AddressUnavailable, ConfigError, StoreFailed
from esperd.messages.base import Message, Reply
from esperd.messages.control import Hello, Welcome
from esperd.store.refusal import refusal_of
from esperd.telemetry.metrics import Metrics

REVOKED_LOOK_S = 0.5
"""How often it is looked whether somebody is allowed no more who may still hear events; chosen, not measured."""
REBIND_FIRST_S, REBIND_LAST_S = 0.02, 1.0
"""How long to wait before a port that was just closed is bound again: the first time, and, doubled with each, at most. Chosen,
not measured."""
REBIND_TOLD_S = 5.0
"""How long that may go on before somebody is told: a port that was just closed may take a moment to be free again. Chosen."""
WITHOUT_KEY = b"without a key"
"""All who come over the network where no keys are asked for: a connection is nobody, and the next one could be anybody."""
LOGGED_PER_S = 1.0
LOGGED_AT_ONCE = 20
"""Refusals that are logged; whoever knocks faster fills the metric, and not the disk."""

LARGEST_PORT = 65_535

Answer = Callable[[bytes, Message], Awaitable[Reply]]

log = structlog.get_logger()


def server_key_file(state_directory: Path) -> Path:
    """Where the daemon keeps its own secret key."""
    return state_directory / "keys" / "server.key"


def allow_list(state_directory: Path) -> AllowList:
    """Who may connect to the daemon of this state directory."""
    return AllowList(state_directory / "keys" / "allowed")


def endpoints(network: Network) -> tuple[str, str]:
    """Where requests and events are served.

    Raises:
        ConfigError: when one of them is not ``tcp://ADDRESS:PORT``, or is beyond loopback without keys.
    """
    requests = _address(network.listen, "listen")
    if not network.events and (requests.port or 0) >= LARGEST_PORT:
        raise ConfigError(
            f"network.listen = {network.listen!r} leaves no port for events; set network.events", key="network.events"
        )
    events = network.events or f"tcp://{requests.netloc.rpartition(':')[0]}:{(requests.port or 0) + 1}"
    for key, url in (("listen", requests), ("events", _address(events, "events"))):
        if not network.curve and not _is_loopback(url.hostname or ""):
            raise ConfigError(
                f"network.{key} = {url.geturl()!r} is beyond loopback, where only clients with keys are served; set "
                "network.curve = true and allow them with `esper keys allow`",
                key=f"network.{key}",
            )
    return network.listen, events


def require_network(config: Config) -> None:
    """Refuse what ``[network]`` may not ask for; it may ask for nothing.

    Raises:
        ConfigError: see :func:`endpoints`; or it listens beyond loopback and nobody is allowed, or the daemon's own key cannot
            be used.
        StoreFailed: when the allow-list cannot be read, or the disk does not give that key.
    """
    network, state = config.network, config.state_directory
    if not network.listen:
        return
    endpoints(network)
    if not network.curve:
        return
    allowed = allow_list(state)
    try:
        names = allowed.names()
        has_key = server_key_file(state).exists()
    except OSError as error:
        raise StoreFailed(f"{allowed.directory} cannot be read: {error.strerror}", path=str(allowed.directory)) from error
    if not names and not _is_loopback(urlsplit(network.listen).hostname or ""):
        raise ConfigError(
            f"network.listen = {network.listen!r} is beyond loopback, and nobody is allowed{_but_for(allowed.skipped)}; first: "
            f"esper keys allow NAME KEY --state-dir {state}",
            key="network.listen",
        )
    if has_key:
        with _telling_a_disk_that_refuses():
            read_pair(server_key_file(state))


def _but_for(skipped: Mapping[str, str]) -> str:
    """Files that would allow somebody; in parentheses."""
    return f" ({', '.join(f'{name}: {why}' for name, why in skipped.items())})" if skipped else ""


@contextlib.contextmanager
def _telling_a_disk_that_refuses() -> Iterator[None]:
    """A key that the disk does not give or take is no mistake in a configuration, and may be tried again."""
    try:
        yield
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and refusal_of(error.__cause__) is not None:
            raise StoreFailed(error.message, **error.fields) from error
        raise


def _address(endpoint: str, key: str) -> SplitResult:
    url = urlsplit(endpoint)
    try:
        port = url.port
    except ValueError:
        port = None
    if url.scheme != "tcp" or not url.hostname or not port or url.path or url.query or url.fragment or "@" in url.netloc:
        raise ConfigError(f"network.{key} = {endpoint!r} is not of the form tcp://ADDRESS:PORT", key=f"network.{key}")
    return url


def _is_loopback(host: str) -> bool:
    """True for an address of this machine alone; a name is not trusted to be one, ``localhost`` aside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RemoteDoor:
    """The daemon's sockets on the network; does nothing where none are configured.

    Args:
        config: ``[network]``, ``[limits]`` and the state directory are used.
        metrics: counts who is refused.
        clock: time.
    """

    def __init__(self, config: Config, metrics: Metrics, clock: Clock) -> None:
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._loud = TokenBucket(LOGGED_PER_S, LOGGED_AT_ONCE, clock.monotonic())
        self._unlogged = 0
        self._events = ""
        self._skipped: dict[str, str] = {}
        self._security: ServerSecurity | None = None
        self._publisher: Publisher | None = None
        self.trouble = ""
        """Why events are not published on the network though they should be; empty: they are."""

    @contextlib.asynccontextmanager
    async def publishing(self) -> AsyncGenerator[None, None]:
        """Serve events, and know who may connect, for the length of the block.

        Raises:
            ConfigError: see :func:`require_network`; or an address cannot be listened on.
            AddressUnavailable: an address cannot be listened on now.
            StoreFailed: when the allow-list cannot be read, or the disk refuses.
        """
        network = self._config.network
        if not network.listen:
            yield
            return
        _, self._events = endpoints(network)
        async with contextlib.AsyncExitStack() as stack:
            if network.curve:
                self._security = self._open_security()
                await stack.enter_async_context(Gate(self._security))
            async with open_task_group() as tasks:
                await tasks.start(self._publish)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()

    def _open_security(self) -> ServerSecurity:
        require_network(self._config)
        state = self._config.state_directory
        allowed = allow_list(state)
        with _telling_a_disk_that_refuses():
            keys = open_pair(server_key_file(state))
        log.info("clients need keys", server_key=keys.public.hex(), allowed=len(allowed.names()))
        return ServerSecurity(keys, allowed, self.refused)

    async def _publish(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Publish for ever. ZeroMQ cannot disconnect one watcher: when somebody is allowed no more, all of them are, and
        those who still may come back by themselves.

        What cannot be bound at the start ends the daemon, for whoever started it to try again. Later it is tried again here: an
        interface that is down for a while ends no training.
        """
        publisher = await self._bound()
        while True:
            try:
                self._publisher = publisher
                task_status.started()
                await self._until_somebody_is_revoked()
                log.info("a key was revoked: whoever hears events connects anew")
            finally:
                self._publisher = None
                await publisher.__aexit__(None, None, None)
            task_status = anyio.TASK_STATUS_IGNORED
            publisher = await self._bound_again()

    async def _bound(self) -> Publisher:
        publisher = Publisher(self._events, security=self._security)
        try:
            await publisher.__aenter__()
        except zmq.ZMQError as error:
            raise _cannot_listen(self._events, "network.events", error) from error
        return publisher

    async def _bound_again(self) -> Publisher:
        since, wait_s = self._clock.monotonic(), REBIND_FIRST_S
        while True:
            try:
                publisher = await self._bound()
            except (AddressUnavailable, ConfigError) as error:
                if not self.trouble and self._clock.monotonic() - since >= REBIND_TOLD_S:
                    self.trouble = f"no events on the network: {error}"
                    log.warning("events cannot be published on the network; it is tried again and again", error=str(error))
                await self._clock.sleep(wait_s)
                wait_s = min(2 * wait_s, REBIND_LAST_S)
            else:
                if self.trouble:
                    self.trouble = ""
                    log.info("events are published on the network again", events=self._events)
                return publisher

    async def _until_somebody_is_revoked(self) -> None:
        allowed = self._who_may()
        while self._security is None or allowed <= (now := self._who_may()):
            if self._security is not None:
                allowed = now
            await self._clock.sleep(REVOKED_LOOK_S)

    def _who_may(self) -> set[bytes]:
        if self._security is None:
            return set()
        allowed = self._security.allowed
        try:
            now, skipped = set(allowed.names()), allowed.skipped
        except OSError as error:  # nobody can say: nobody may
            now, skipped = set(), {".": str(error)}
        if skipped != self._skipped:
            self._skipped = skipped
            if skipped:
                log.warning("files of the allow-list allow nobody", directory=str(allowed.directory), files=skipped)
        return now

    async def publish(self, topic: str, payload: bytes) -> None:
        """Hand a publication to every remote watcher; as lossy as :class:`Publisher`."""
        if self._publisher is not None:
            await self._publisher.publish(topic, payload)

    @contextlib.asynccontextmanager
    async def answering(self, answer: Answer) -> AsyncGenerator[RequestServer | None, None]:
        """Serve requests for the length of the block, with the answers of the daemon's front door.

        Raises:
            ConfigError: when the address cannot be listened on.
            AddressUnavailable: when it cannot be now: it is taken, or not up yet.
        """
        network = self._config.network
        if not network.listen:
            yield None
            return

        async def answer_remote(client: bytes, message: Message) -> Reply:
            reply = await answer(client if network.curve else WITHOUT_KEY, message)
            if isinstance(message, Hello) and isinstance(reply, Welcome):
                return msgspec.structs.replace(reply, events_endpoint=seen_from(message.reached_at, self._events))
            return reply

        server = RequestServer(
            network.listen, answer_remote, security=self._security, turnstile=Turnstile(client_limits(self._config))
        )
        try:
            await server.__aenter__()
        except zmq.ZMQError as error:
            raise _cannot_listen(network.listen, "network.listen", error) from error
        try:
            log.info("serving clients on the network", listen=network.listen, events=self._events, curve=network.curve)
            yield server
        finally:
            await server.__aexit__(None, None, None)

    def refused(self, reason: str, facts: dict[str, str]) -> None:
        """Count a client that was turned away, and log it, but no faster than a log bears."""
        self._metrics.observe_refused_client(reason)
        if self._loud.take(self._clock.monotonic()):
            self._unlogged += 1
            return
        log.warning("a client was refused", reason=reason, unlogged_before=self._unlogged, **facts)
        self._unlogged = 0


def client_limits(config: Config) -> ClientLimits:
    """``[limits]`` as the turnstile takes them."""
    limits = config.limits
    return ClientLimits(
        request_bytes=limits.request_bytes,
        requests_per_s=limits.requests_per_s,
        burst=limits.burst,
        open_requests=limits.open_requests,
    )


def seen_from(reached_at: str, endpoint: str) -> str:
    """An endpoint of ours as a client sees it: under the host it came through, for ours may be a wildcard, or inside of a NAT."""
    host = urlsplit(reached_at).netloc.rpartition(":")[0]
    return f"tcp://{host}:{urlsplit(endpoint).port}" if host else endpoint


def _cannot_listen(endpoint: str, key: str, error: zmq.ZMQError) -> ConfigError | AddressUnavailable:
    return cannot_listen(f"{key} = {endpoint!r} cannot be listened on", error, another="choose another", key=key)
