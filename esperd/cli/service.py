"""``esperd install-service``: a systemd unit for this installation, written where its manager looks, never over an edited one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from esperd.cli.configured import config_option, load, state_option
from esperd.cli.options import Options, output_options

if TYPE_CHECKING:
    from esperd.config import Config
    from esperd.daemon.unit import Unit

UNIT = "esperd.service"
SYSTEM_DIRECTORY = Path("/etc/systemd/system")
ANSWER_TIMEOUT_S = 30.0
"""Chosen, not measured."""

_options = click.make_pass_decorator(Options)


@click.command(name="install-service")
@click.option("--user/--system", "for_user", default=True, help="A service of yours (default), or of the whole machine.")
@click.option("--run-as", metavar="USER", default="esperd", show_default=True, help="User of a --system service.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit and write nothing.")
@click.option("--force", is_flag=True, help="Overwrite a unit that was edited, or that something else wrote.")
@config_option
@state_option
@output_options
@_options
def install_service(
    options: Options,
    config_file: Path | None,
    state_dir: Path | None,
    run_as: str,
    *,
    for_user: bool,
    only_print: bool,
    force: bool,
) -> None:
    """Write a systemd unit for this installation and say how to enable it."""
    from esperd.cli.output import Output
    from esperd.config import ENVIRONMENT_PREFIX

    config = load(config_file, state_dir)
    unit = unit_of(config, "user" if for_user else "system", config_file, state_dir, run_as)
    path = unit_path(unit.scope)
    output = Output(options)
    if only_print:
        if output.as_json:
            output.json({"path": str(path), "unit": unit.text(), "written": False})
        else:
            output.line(unit.text().rstrip())
        return
    faults = verified(unit)
    ignored = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX))
    _write(path, unit, force=force)
    commands = how_to_enable(unit)
    if output.as_json:
        output.json({"path": str(path), "written": True, "commands": commands, "faults": faults, "ignored": ignored})
        return
    output.line(f"wrote {path}")
    for fault in faults or ():
        output.line(f"systemd-analyze: {fault}", style="yellow")
    if ignored:
        output.line(f"variables of this shell do not count there, write them into the file: {', '.join(ignored)}")
    output.line("to enable it now and at every start:")
    for command in commands:
        output.line(f"  {command}")


def unit_of(
    config: Config, scope: Literal["user", "system"], config_file: Path | None, state_dir: Path | None, run_as: str
) -> Unit:
    """The unit that runs this installation with this configuration.

    Args:
        config: in force.
        scope: whose service manager.
        config_file: named on the command line, and in the unit.
        state_dir: named on the command line, and in the unit.
        run_as: user of a system service.
    """
    from esperd.daemon.unit import Unit

    # What a shell has in its environment a service manager has not: a user's directory is named in the unit.
    named = state_dir is not None or bool(config.daemon.state_directory)
    state = config.state_directory if scope == "user" or named else None
    arguments = ["--config", str(config_file.absolute())] if config_file is not None else []
    if state is not None and (scope == "user" or state_dir is not None):
        arguments += ["--state-dir", str(state)]
    return Unit(
        scope=scope,
        command=_command(),
        arguments=arguments,
        drain_timeout_s=config.daemon.drain_timeout_s,
        systemd=systemd_version(),
        run_as=run_as if scope == "system" else None,
        state_directory=state,
        writable=[config.runtime_directory] if config.daemon.runtime_directory else [],
        listens=bool(config.network.listen),
    )


def _command() -> list[str]:
    script = Path(sys.executable).parent / "esperd"
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "esperd.cli.daemon"]


def unit_path(scope: Literal["user", "system"]) -> Path:
    """Where the service manager looks for units that people install."""
    if scope == "system":
        return SYSTEM_DIRECTORY / UNIT
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "systemd" / "user" / UNIT


def systemd_version() -> int | None:
    """Of this machine; None where there is no systemd, or it does not say."""
    found = _answer("systemctl", "--version")
    version = re.match(r"systemd (\d+)", found.stdout) if found is not None else None
    return int(version[1]) if version is not None else None


def verified(unit: Unit) -> list[str] | None:
    """What ``systemd-analyze verify`` finds wrong with a unit; None where it cannot be asked."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="esperd-unit-") as directory:
        file = Path(directory) / UNIT
        file.write_text(unit.text(), encoding="utf-8")
        # As a system unit also for a user: the syntax is the same, and a user's manager need not run for it.
        found = _answer("systemd-analyze", "verify", "--man=no", str(file))
    return None if found is None else [line for line in found.stderr.splitlines() if UNIT in line]


def _answer(program: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    path = shutil.which(program)
    if path is None:
        return None
    return subprocess.run(  # noqa: S603 - of this machine
        [path, *arguments], capture_output=True, text=True, check=False, timeout=ANSWER_TIMEOUT_S
    )


def how_to_enable(unit: Unit) -> list[str]:
    """Commands for people; nothing is run by itself."""
    if unit.scope == "user":
        return [
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now {UNIT}",
            "loginctl enable-linger  # so that it runs while you are not logged in",
        ]
    runtime = unit.writable[0] if unit.writable else Path("/run/esperd")
    return [
        f"useradd --system --home-dir /var/lib/esperd --shell /usr/sbin/nologin {unit.run_as}  # where there is no such user",
        "systemctl daemon-reload",
        f"systemctl enable --now {UNIT}",
        f"sudo -u {unit.run_as} esper --endpoint ipc://{runtime}/control.sock actors  # its socket is for that user only",
    ]


def _write(path: Path, unit: Unit, *, force: bool) -> None:
    """Put the unit in its place, whole or not at all.

    Raises:
        Conflict: something else, or an edited unit, is there.
        StateDirectoryUnusable: a user's state directory cannot be made.
    """
    from esperd.daemon.lock import prepare_state_directory
    from esperd.daemon.unit import is_edited
    from esperd.errors import Conflict

    if path.exists() and not force and is_edited(path.read_text(encoding="utf-8", errors="replace")):
        raise Conflict(
            f"{path} was edited, or is not of esperd; compare it with `esperd install-service --print`, keep your changes in "
            f"`systemctl {'--user ' if unit.scope == 'user' else ''}edit {UNIT}`, and overwrite it with --force",
            path=str(path),
        )
    if unit.scope == "user" and unit.state_directory is not None:
        prepare_state_directory(unit.state_directory)  # a sandbox opens only what is there
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(unit.text(), encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)
