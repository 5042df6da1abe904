"""``esperd.toml`` and ``ESPERD__SECTION__KEY`` variables → one frozen Struct. Unknown keys are errors; defaults live here."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs

from esperd.errors import ConfigError

ENVIRONMENT_PREFIX = "ESPERD__"
LONGEST_SOCKET_PATH = 107
"""Bytes of a Unix socket path on Linux (sun_path), less its terminator."""

Seconds = Annotated[float, msgspec.Meta(gt=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(ge=0.0)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of esperd.toml."""


class Daemon(Section, frozen=True, kw_only=True):
    """``[daemon]``."""

    state_directory: str = ""
    """Databases, kernels, checkpoints, models. Empty: ``$STATE_DIRECTORY``, else the user's XDG state directory."""
    runtime_directory: str = ""
    """Sockets. Empty: ``$RUNTIME_DIRECTORY``, else ``run`` under the state directory."""
    drain_timeout_s: Seconds = 30.0
    """How long SIGTERM, a pause and a cancellation wait for workers to stop before they are killed; they stay resumable."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Http(Section, frozen=True, kw_only=True):
    """``[http]``: /livez, /readyz and /metrics."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 7411
    """0: any free port, written to ``http.port`` in the runtime directory."""


class Jobs(Section, frozen=True, kw_only=True):
    """``[jobs]``."""

    max_running: Count = 1
    """Trainer workers at one time."""
    max_queued: Count = 1000
    """More are refused with ``busy``."""
    max_attempts: Count = 5
    """Lost workers after which a job is dead."""
    backoff_s: Seconds = 1.0
    """Wait before the second attempt; doubles each time, up to ``backoff_max_s``."""
    backoff_max_s: Seconds = 300.0
    allowed_modules: tuple[str, ...] = ()
    """Packages that a job's ``module:function`` names may come from (``mylab`` allows ``mylab.models:resnet``). Empty: any."""
    allowed_pythons: tuple[str, ...] = ()
    """Interpreters, or directories of them, that a job's ``python`` may name. Empty: any, or with ``allowed_modules`` none."""
    allowed_workdirs: tuple[str, ...] = ()
    """Directories that a job's ``workdir`` and data file must lie in. Empty: any."""


class Network(Section, frozen=True, kw_only=True):
    """``[network]``: clients that do not come through the runtime directory."""

    listen: str = ""
    """``tcp://ADDRESS:PORT`` for requests. Empty: none; the daemon is reached through its runtime directory only."""
    events: str = ""
    """``tcp://ADDRESS:PORT`` for events. Empty: the port after that of ``listen``."""
    curve: bool = True
    """False: no keys, on a loopback address only, where every user of this machine may then give orders."""


class Limits(Section, frozen=True, kw_only=True):
    """``[limits]``: what one client may ask. A client is a key, or a connection through the runtime directory."""

    request_bytes: Annotated[int, msgspec.Meta(ge=1024, le=64 * 1024 * 1024)] = 8 * 1024 * 1024
    """Of one request; larger ones are refused, and a frame beyond 4 times this ends the connection."""
    requests_per_s: Annotated[float, msgspec.Meta(gt=0.0)] = 2_000.0
    """More are answered with ``busy``; chosen, not measured."""
    burst: Count = 4_000
    """Requests at once before ``requests_per_s`` counts; chosen, not measured."""
    open_requests: Count = 256
    """Requests that wait for their answer at one time."""
    queued_jobs: Count = 1_000
    """Jobs that wait, of one key; all who come through the runtime directory count as one client."""


class Resources(Section, frozen=True, kw_only=True):
    """``[resources]``: what jobs may use together. 0: all that the machine has, as far as its control groups let the daemon."""

    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    cores: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """A job takes as many as it has ``threads``."""
    gpu_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of each card."""
    max_load: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Load of the machine over the last minute from which on no second job starts beside one. 0: it is not looked at."""


class Workers(Section, frozen=True, kw_only=True):
    """``[workers]``: processes of trainer and compiler."""

    start_timeout_s: Seconds = 120.0
    """From spawn to READY; importing torch on a cold disk is slow."""
    heartbeat_interval_s: Seconds = 1.0
    heartbeat_timeout_s: Seconds = 20.0
    """A silent worker is killed and replaced after this long, one that computes meanwhile after five times as long; a worker
    whose daemon is silent this long checkpoints and exits."""
    stall_timeout_s: Amount = 900.0
    """A trainer that beats, but takes no step and less than a hundredth of a processor for so long is killed, and the attempt is
    lost. 0: never. Chosen, not measured."""


class Compiler(Section, frozen=True, kw_only=True):
    """``[compiler]``."""

    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """Scheduling priority of the compiler process: it yields to training."""
    timeout_s: Seconds = 300.0
    """Longest compilation of one kernel."""


class Cache(Section, frozen=True, kw_only=True):
    """``[cache]``."""

    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    """Kernels kept in memory, least recently used out first."""


class Storage(Section, frozen=True, kw_only=True):
    """``[storage]``: what is done when the disk fills up, and what is kept."""

    min_free_bytes: Annotated[int, msgspec.Meta(ge=0)] = 64 * 1024 * 1024
    """Below so many free bytes the daemon turns read-only."""
    reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 16 * 1024 * 1024
    """Size of the reserve file, which is given up when the disk is full."""
    collect_every_s: Seconds = 3600.0
    """Between two looks for blobs that nobody refers to; one must be found twice."""
    keep_failed_s: Seconds = 7 * 24 * 3600.0
    """How long the checkpoints of a failed or dead job are kept for ``esper retry``."""


class Breaker(Section, frozen=True, kw_only=True):
    """One service of ``[breakers]``."""

    failures: Count = 3
    """In a row, after which the service is left alone."""
    reset_s: Seconds = 30.0
    """How long, before one request tries whether it is back."""


class Breakers(Section, frozen=True, kw_only=True):
    """``[breakers]``: when a service that keeps failing is no longer asked."""

    policy: Breaker = Breaker()
    compiler: Breaker = Breaker()
    cache: Breaker = Breaker()
    telemetry: Breaker = Breaker(failures=2, reset_s=5.0)


class Retention(Section, frozen=True, kw_only=True):
    """``[retention]``: how long what finished jobs left is kept. Unfinished jobs are never touched."""

    events_days: Amount = 365.0
    """Events of a job are deleted this many days after its end. 0: never."""
    events_bytes: Bytes = 4 * 1024**3
    """Where the event log is larger, the events of finished jobs go, those that ended first first. 0: no bound."""
    jobs_days: Amount = 0.0
    """A job is forgotten this many days after its end, with its events and its artifacts. 0: never."""
    jobs_bytes: Bytes = 0
    """Where the artifacts of finished jobs are larger, jobs are forgotten, those that ended first first. 0: no bound."""
    every_s: Seconds = 3600.0
    """Between two looks."""


class Telemetry(Section, frozen=True, kw_only=True):
    """``[telemetry]``."""

    otlp_endpoint: str = ""
    """Where traces are sent: an OTLP collector over HTTP. Empty: nothing is traced."""
    trace_steps: bool = False
    """Whether every training step is a span, and not only every epoch."""


class Plugins(Section, frozen=True, kw_only=True):
    """``[plugins]``."""

    blocked: tuple[str, ...] = ()
    """Names of installed plugins not to load."""


class Config(Section, frozen=True, kw_only=True):
    """The daemon's whole configuration."""

    daemon: Daemon = Daemon()
    http: Http = Http()
    jobs: Jobs = Jobs()
    resources: Resources = Resources()
    network: Network = Network()
    limits: Limits = Limits()
    workers: Workers = Workers()
    compiler: Compiler = Compiler()
    cache: Cache = Cache()
    storage: Storage = Storage()
    breakers: Breakers = Breakers()
    retention: Retention = Retention()
    telemetry: Telemetry = Telemetry()
    plugins: Plugins = Plugins()

    @property
    def state_directory(self) -> Path:
        """Absolute path of the state directory."""
        return state_directory(self.daemon.state_directory)

    @property
    def runtime_directory(self) -> Path:
        """Absolute path of the directory that holds the sockets."""
        named = self.daemon.runtime_directory or os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        return Path(named).expanduser().absolute() if named else self.state_directory / "run"


def state_directory(named: str = "") -> Path:
    """Where a daemon keeps its state: as named, else ``$STATE_DIRECTORY`` (systemd), else the XDG state directory."""
    chosen = named or os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or platformdirs.user_state_dir("esperd")
    return Path(chosen).expanduser().absolute()


def endpoint(runtime_directory: Path, name: str) -> str:
    """ZeroMQ endpoint of a socket in the runtime directory.

    Raises:
        ConfigError: when the path is longer than a Unix socket's may be.
    """
    path = runtime_directory / f"{name}.sock"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"socket path {path} is longer than {LONGEST_SOCKET_PATH} bytes; set daemon.runtime_directory to a shorter one",
            key="daemon.runtime_directory",
        )
    return f"ipc://{path}"


def load_config(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """Read a configuration: file first, then environment variables over it.

    Args:
        path: a TOML file; None: defaults only.
        environment: variables; None: ``os.environ``. ``ESPERD__JOBS__MAX_RUNNING=2`` sets ``jobs.max_running``.

    Raises:
        ConfigError: when the file cannot be read or parsed, or a key or value is wrong; names the place.
    """
    values, origins = _gather(path, os.environ if environment is None else environment)
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        variables = [place for place in dict.fromkeys(origins.values()) if place != str(path)]
        origin = ", ".join([str(path) if path else "defaults", *variables])
        raise ConfigError(f"{error} (in {origin})", path=origin) from error


def key_origins(path: Path | None = None, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where every value that is no default came from: a file's path or a variable's name, by ``section.key``.

    Args:
        path: see :func:`load_config`.
        environment: see :func:`load_config`.

    Raises:
        ConfigError: when the file cannot be read or parsed, or a variable's name is wrong.
    """
    return _gather(path, os.environ if environment is None else environment)[1]


def _gather(path: Path | None, environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by section and key as file and variables give them, and where each came from by ``section.key``."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}", path=str(path)) from error
    origins = {f"{section}.{key}": str(path) for section, table in values.items() if isinstance(table, dict) for key in table}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        section, separator, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if not separator:
            raise ConfigError(f"{variable} is not of the form ESPERD__SECTION__KEY", key=variable)
        table = values.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{section} must be a table, as in [{section}]", key=section)
        table[key] = _parse(text)
        origins[f"{section}.{key}"] = variable
    return values, origins


def _parse(text: str) -> Any:  # noqa: ANN401 - a TOML value
    """A variable's value, as TOML where it is TOML (numbers, booleans, lists), else as the string it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
