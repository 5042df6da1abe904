"""A systemd unit for this installation, as a pure function of where things are; and whether somebody edited one.

Sandboxing stops short of what training needs: just-in-time compilers want memory that is writable and executable, GPUs their
devices (``ProtectClock`` would forbid those too), and drivers choose their system calls. See ``systemd.exec(5)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

NOTIFY_RELOAD_SINCE = 253
"""First systemd that knows ``Type=notify-reload``."""
WATCHDOG_S = 60
"""How long the daemon may show no sign of life; chosen, not measured: longer than a commit on a disk that is busy."""
RESTART_S = 10
"""Between two starts, however many there are: a start that is refused takes a core about a second. Chosen, not measured."""
STOP_MARGIN_S = 30.0
"""Beyond the drain: workers that did not end are killed, databases are closed. Chosen, not measured."""
_MARK = "# Written by esperd; the SHA-256 of all that follows is "


@dataclass(frozen=True)
class Unit:
    """What a unit is made for.

    Args:
        scope: whose service manager.
        command: that starts ``esperd``, as absolute paths.
        arguments: of ``esperd run``.
        drain_timeout_s: in force.
        systemd: version; None where there is none to ask.
        run_as: user of a system service; None: whoever the manager belongs to.
        state_directory: of a user's service, or one that is configured; None: systemd makes one.
        writable: further directories that the daemon must be able to write.
        listens: on the network, too.
    """

    scope: Literal["user", "system"]
    command: Sequence[str]
    arguments: Sequence[str]
    drain_timeout_s: float
    systemd: int | None = None
    run_as: str | None = None
    state_directory: Path | None = None
    writable: Sequence[Path] = field(default=())
    listens: bool = False

    def text(self) -> str:
        """The unit file, with a first line by which :func:`is_edited` knows it again."""
        body = "\n".join([*self._head(), *self._service(), *self._sandbox(), *self._install(), ""])
        return f"{_MARK}{_digest(body)}\n{body}"

    def _head(self) -> list[str]:
        network = ["After=network.target"] if self.scope == "system" else []
        if self.scope == "system" and self.listens:
            # An address that is not up yet cannot be listened on. That is tried again; it need not come to it at every boot.
            network = ["Wants=network-online.target", "After=network-online.target"]
        return [
            "[Unit]",
            "Description=esperd, grows neural networks while they train",
            *network,
            # A disk that fails may be mended in a minute or in a week: the manager may not have given up by then.
            "StartLimitIntervalSec=0",
            "",
        ]

    def _service(self) -> list[str]:
        return [
            "[Service]",
            *self._type(),
            "NotifyAccess=main",
            f"ExecStart={_words([*self.command, 'run', *self.arguments])}",
            f"WatchdogSec={WATCHDOG_S}",
            "TimeoutStartSec=120",
            f"TimeoutStopSec={self.drain_timeout_s + STOP_MARGIN_S:g}",
            # The daemon drains at SIGTERM and stops its workers itself; what is left after that is killed.
            "KillMode=mixed",
            # A worker that runs out of memory is a job that failed, and not the end of the service, as systemd would have it. For
            # the same reason there is no MemoryMax=: workers are in this control group, and it is them that the kernel would end.
            "OOMPolicy=continue",
            "Restart=on-failure",
            f"RestartSec={RESTART_S}",
            # A wrong configuration does not become right by itself. `esperd run` checks it before it touches anything; the exit
            # code of an ExecStartPre= would prevent nothing.
            "RestartPreventExitStatus=2",
            "UMask=0077",
            *([f"User={self.run_as}"] if self.run_as else []),
            *self._directories(),
            "",
        ]

    def _type(self) -> list[str]:
        if self.systemd is not None and self.systemd < NOTIFY_RELOAD_SINCE:
            return ["Type=notify", "ExecReload=/bin/kill -HUP $MAINPID"]
        return ["Type=notify-reload"]

    def _directories(self) -> list[str]:
        if self.scope == "user":
            return []  # the default ones, which `esper` looks in as well
        made = [] if self.state_directory else ["StateDirectory=esperd", "StateDirectoryMode=0700"]
        return [*made, "RuntimeDirectory=esperd", "RuntimeDirectoryMode=0700"]

    def _sandbox(self) -> list[str]:
        directories = [*([self.state_directory] if self.state_directory else []), *self.writable]
        writable = [f"ReadWritePaths={_words([f'-{path}'])}" for path in directories]
        return [
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "ProtectHome=read-only",
            *writable,
            # Sockets or state in there must be seen by others.
            f"PrivateTmp={'no' if any(map(_is_temporary, directories)) else 'yes'}",
            "ProtectControlGroups=yes",
            "ProtectHostname=yes",
            "ProtectKernelLogs=yes",
            "ProtectKernelModules=yes",
            "ProtectKernelTunables=yes",
            "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            "RestrictNamespaces=yes",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
            "LockPersonality=yes",
            "SystemCallArchitectures=native",
            *(["CapabilityBoundingSet="] if self.scope == "system" else []),
            "",
        ]

    def _install(self) -> list[str]:
        return ["[Install]", f"WantedBy={'default.target' if self.scope == 'user' else 'multi-user.target'}"]


def is_edited(text: str) -> bool:
    """Whether a unit file is not, or no longer, as :meth:`Unit.text` wrote it."""
    first, _, body = text.partition("\n")
    return first != f"{_MARK}{_digest(body)}"


def _is_temporary(path: Path) -> bool:
    return path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp")  # noqa: S108 - what PrivateTmp hides


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _words(words: Sequence[str]) -> str:
    """Words of a command line, or paths, quoted for systemd, which expands ``%`` and ``$``."""
    quoted = []
    for word in words:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        quoted.append(f'"{escaped}"' if any(letter in word for letter in " '\"\\;\t") or not word else escaped)
    return " ".join(quoted)
