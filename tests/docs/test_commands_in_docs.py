"""Every command that the operator's documents name does what they say, against one real daemon on a network of its own.

The commands are read out of the documents: a new one is run without anybody adding it here, and one that esperd does not know,
or with a placeholder that nobody knows, fails. What is not run has its reason in ``NOT_RUN`` or ``MANAGERS``, and is checked as
far as it can be.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anyio
import click
import pytest
from commands_in_docs import OURS, Command, commands_of

from esperd.actors.keys import read_pair
from esperd.cli.client import esper
from esperd.cli.daemon import esperd
from esperd.cli.exit_codes import OK, run
from esperd.config import Config, Jobs, Network, load_config
from esperd.messages.dead_letters import DeadLetterList, ListDeadLetters
from esperd.testing import DaemonProcess, running_daemon

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("runbook.md", "tuning.md", "security.md", "service.md")
COMMANDS = [command for name in DOCUMENTS for command in commands_of(ROOT / "docs" / name)]
PROGRAMS: dict[str, click.Group] = {"esper": esper, "esperd": esperd}

NOT_RUN = {
    ("esperd", "run"): "it does not end, and may listen on every address; the daemon of these tests was started by it",
}
MANAGERS = {
    "systemctl": "needs a systemd that runs this service",
    "journalctl": "needs the journal of a systemd that runs this service",
    "loginctl": "needs root, and changes this machine",
    "dmesg": "needs root on most machines",
}
AS_A_PERSON = {("esper", "evidence", "--forget"): ["--yes"]}
"""What a terminal would ask for."""
SIGNALS = {"-USR1": "dump: done", "-HUP": "reloaded"}
"""What stands in the log once a signal was obeyed."""

HOSTS = {"succeeded": "networks:small", "failed": "broken:network"}
"""Jobs that the daemon has, by how they ended."""

LETTERS = """
import time
from esperd.actors.dead_letters import DeadLetter, Reason
from esperd.daemon import dead_letters
from esperd.messages.jobs import ListJobs

answer = dead_letters.answer


async def with_letters(system, message):
    while len(system.dead_letters.newest(2)) < 2:
        letter = DeadLetter(at=time.time(), reason=Reason.ACTOR_STOPPED, to="jobs", sender="somebody", message=ListJobs())
        system.dead_letters.add(letter)
    return await answer(system, message)


dead_letters.answer = with_letters
"""
"""A plugin: there are dead letters whenever somebody looks at them, as after a restart of the jobs actor."""


class Place:
    """The daemon, and what the placeholders of the documents stand for on it."""

    def __init__(self, daemon: DaemonProcess, folder: Path, server_key: str, listen: str, jobs: dict[str, str]) -> None:
        self.daemon = daemon
        self.folder = folder
        self.client_key = folder / "config" / "esperd" / "keys" / "me.key"
        self._listen = listen
        self._jobs = jobs
        self._values = {
            "SERVERKEY": lambda: server_key,
            "NAME": lambda: "somebody",
            "PID": lambda: str(daemon.pid),
            "BACKUP": self._backup,
            "DIR": lambda: tempfile.mkdtemp(dir=folder),
        }

    def _backup(self) -> str:
        directory = self.folder / "another-backup"
        if not directory.exists():
            assert run(esperd, ["db", "backup", str(directory)]) == OK
        return str(directory)

    def _letter(self) -> str:
        async def newest() -> int:
            async with self.daemon.client() as client:
                return (await client.ask(ListDeadLetters(), DeadLetterList)).letters[0].id

        return str(anyio.run(newest))

    def _endless(self) -> str:
        with self.daemon.sync_client() as client:
            return client.submit({**job(HOSTS["succeeded"]), "budget": {"epochs": 10**6}}).id

    def filled_in(self, command: Command) -> list[str]:
        """The words of a command for this daemon."""
        return [self._word(command, word) for word in command.words]

    def _word(self, command: Command, word: str) -> str:
        if word == "ID":
            if command.words[1] == "dead-letters":
                return self._letter()
            if command.words[1] in ("cancel", "pause"):
                return self._endless()
            return self._jobs["failed" if command.words[1] in ("explain-failure", "retry") else "succeeded"]
        if word == "KEY":
            name = self._word(command, command.words[-2])
            return read_pair(self.client_key.with_name(f"{name}.key")).public.hex()
        if word == "FILE":
            return str(self.client_key if "--client-key" in command.words else self.folder / "esperd.toml")
        if word.startswith("tcp://HOST:"):
            return self._listen
        if word.startswith("ipc:///run/esperd/"):
            return self.daemon.endpoint
        if word.startswith("$URL/"):
            return word.replace("$URL", self.daemon.http_url)
        if word.startswith("~/"):
            return str(self.folder / word.removeprefix("~/"))
        if word.isupper() and word.isalpha():
            assert word in self._values, f"{command}: say in Place what {word} stands for"
            return self._values[word]()
        return word


def free_endpoints() -> tuple[str, str]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return tuple(f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in (one, other))


def job(host: str) -> dict[str, object]:
    return {
        "host": host,
        "data": "samples:clouds",
        "workdir": str(ROOT / "tests" / "daemon" / "project"),
        "budget": {"epochs": 1},
        "growth": {"enabled": False},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("docs")
    state = folder / "state"
    packages = folder / "packages" / "letters-0.1.dist-info"
    packages.mkdir(parents=True)
    (packages.parent / "letters.py").write_text(LETTERS)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: letters\nVersion: 0.1\n")
    (packages / "entry_points.txt").write_text("[esperd]\nletters = letters\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ESPERD_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.setenv("XDG_STATE_HOME", str(folder / "states"))
        patch.setenv("ESPERD__DAEMON__STATE_DIRECTORY", str(state))
        patch.chdir(folder)
        for words in (["keys", "create", "me"], ["keys", "create", "somebody"], ["keys", "create", "--server"]):
            assert run(esper, words) == OK
        for name in ("me", "somebody"):
            key = read_pair(folder / "config" / "esperd" / "keys" / f"{name}.key").public.hex()
            assert run(esper, ["keys", "allow", name, key]) == OK
        listen, events = free_endpoints()
        config = Config(network=Network(listen=listen, events=events), jobs=Jobs(max_running=3))
        with running_daemon(state, config, environment={"PYTHONPATH": str(packages.parent)}) as daemon:
            shutil.copy(daemon.runtime_directory / "esperd.toml", folder / "esperd.toml")
            patch.setenv("ESPERD__DAEMON__RUNTIME_DIRECTORY", str(daemon.runtime_directory))
            with daemon.sync_client() as client:
                handles = {ended: client.submit(job(host)) for ended, host in HOSTS.items()}
                for expected, handle in handles.items():
                    assert list(handle.watch())[-1].body.state == expected
            server = read_pair(state / "keys" / "server.key").public.hex()
            yield Place(daemon, folder, server, listen, {ended: handle.id for ended, handle in handles.items()})


def test_the_documents_tell_commands():
    told = {command.file for command in COMMANDS}
    assert told == set(DOCUMENTS)
    assert len(COMMANDS) > 40


def is_mention(words: tuple[str, ...]) -> bool:
    """Whether this is the bare name of a command that takes more: it is spoken of, and not to be typed."""
    found: click.Command | None = PROGRAMS[words[0]]
    for word in words[1:]:
        found = found.commands.get(word) if isinstance(found, click.Group) else None
    return found is not None and any(parameter.required for parameter in found.params)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_the_documents_does_what_they_say(command, place, tmp_path, monkeypatch):
    program, *_ = command.words
    if program in OURS:
        run_ours(command, place, tmp_path, monkeypatch)
    elif program in MANAGERS:
        assert_known_to_its_manager(command)
    elif program == "curl":
        (url,) = place.filled_in(command)[1:]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.status == 200
    elif program == "kill":
        signalled(command, place)
    else:
        assert subprocess.run(list(command.words), capture_output=True, check=False).returncode == 0


def run_ours(command, place, tmp_path, monkeypatch):
    if is_mention(command.words):
        return
    if command.words[:2] in NOT_RUN:
        program, name, *arguments = command.words
        PROGRAMS[program].commands[name].make_context(name, arguments)
        load_config(None, dict(variable.split("=", 1) for variable in command.variables))
        return
    if command.words[1:3] == ("keys", "create"):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if command.words[-1] == "--server" or command.words[1:3] == ("db", "restore"):
        words = place.filled_in(command)  # before: a backup is one of the daemon's state
        monkeypatch.setenv("ESPERD__DAEMON__STATE_DIRECTORY", str(tmp_path / "state"))
    else:
        words = place.filled_in(command)
    for variable in command.variables:
        monkeypatch.setenv(*variable.split("=", 1))
    words += AS_A_PERSON.get(command.words, [])
    assert run(PROGRAMS[words[0]], words[1:]) == OK


def assert_known_to_its_manager(command):
    """Its verbs and options stand in the program's own help, where it is installed."""
    program, *words = command.words
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    for word in (word for word in words if "." not in word and word != "esperd"):
        assert f"{word} " in told or f"{word}\n" in told or f"{word}=" in told, f"{program} knows no {word}"


def signalled(command, place):
    _, name, *pid = place.filled_in(command)
    assert pid in ([], [str(place.daemon.pid)])
    before = place.daemon.log().count(SIGNALS[name])
    subprocess.run(["kill", name, str(place.daemon.pid)], check=True)
    with place.daemon.sync_client() as client:
        while place.daemon.log().count(SIGNALS[name]) == before:
            assert client.daemon.pid == place.daemon.pid
