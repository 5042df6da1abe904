"""A configuration that is read again: live keys apply, the others are named, and the document says which are which."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from esperd.actors.clock import SystemClock
from esperd.actors.keys import new_pair
from esperd.cli.daemon import esperd
from esperd.cli.exit_codes import run
from esperd.config import Cache, Config, Daemon, Jobs, Network, Plugins, Retention
from esperd.daemon.notify import Notifier, Standing
from esperd.daemon.reload import LIVE, compare, flat
from esperd.daemon.remote import allow_list, server_key_file
from esperd.daemon.service import Service
from esperd.daemon.startable import require_startable
from esperd.errors import ConfigError, StoreFailed

DOCUMENT = (Path(__file__).parents[2] / "docs/service.md").read_text(encoding="utf-8")


def test_live_keys_apply_and_the_others_stay_as_they_were_and_are_named():
    in_force = Config()
    wanted = Config(
        daemon=Daemon(log_level="debug"),
        jobs=Jobs(max_running=4),
        cache=Cache(memory_bytes=1),
        plugins=Plugins(blocked=("one",)),
    )
    found = compare(in_force, wanted)
    assert found.applied == ("daemon.log_level: info -> debug", "jobs.max_running: 1 -> 4")
    assert found.needs_restart == ("cache.memory_bytes", "plugins.blocked")
    assert found.config == Config(daemon=Daemon(log_level="debug"), jobs=Jobs(max_running=4))
    again = compare(found.config, wanted)
    assert (again.applied, again.needs_restart) == ((), found.needs_restart)
    assert again.note == "reloaded: nothing changed; a restart is needed for cache.memory_bytes, plugins.blocked"


def test_the_document_lists_the_live_keys_and_no_other():
    assert flat(Config()).keys() >= LIVE
    table = DOCUMENT.partition("## Reload")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", table, flags=re.MULTILINE)) == LIVE


def test_every_kind_of_value_survives_the_way_through_a_reload():
    wanted = msgspec.structs.replace(
        Config(), retention=Retention(events_days=1.5, events_bytes=7), plugins=Plugins(blocked=("a",))
    )
    assert compare(wanted, wanted).config == wanted


def changed(key):
    """The defaults with another value of this key that the configuration allows."""
    section, _, name = key.partition(".")
    before = flat(Config())[key]
    for value in (
        (not before,) if isinstance(before, bool) else (),
        (before + 1, before - 1, before / 2) if isinstance(before, int | float) and not isinstance(before, bool) else (),
        ("debug", "ipc", "tcp://127.0.0.1:7412", "zeromq", "/elsewhere") if isinstance(before, str) else (),
        (["one"],) if isinstance(before, list | tuple) else (),
        ({**before, next(iter(before)): 7},) if isinstance(before, dict) else (),
    ):
        for candidate in value:
            tables = msgspec.to_builtins(Config())
            tables[section][name] = candidate
            try:
                found = msgspec.convert(tables, Config)
            except msgspec.ValidationError:
                continue
            if flat(found)[key] != before:
                return found
    raise AssertionError(f"say in this test how {key} may change")


@pytest.mark.parametrize("key", flat(Config()))
def test_every_key_that_changes_applies_at_once_or_is_named_and_stays_as_it_was(key):
    wanted = changed(key)
    found = compare(Config(), wanted)
    if key in LIVE:
        assert found.config == wanted
        assert ([each.partition(":")[0] for each in found.applied], found.needs_restart) == ([key], ())
    else:
        assert found.config == Config()
        assert (found.applied, found.needs_restart) == ((), (key,))
        assert key in found.note


@pytest.fixture
def read_again(tmp_path, monkeypatch):
    """What SIGHUP calls in a daemon that runs with ``esperd.toml``."""
    readers = []
    monkeypatch.setattr("esperd.daemon.process.run_daemon", lambda _config, again: readers.append(again) or 0)
    (tmp_path / "esperd.toml").write_text("")
    assert run(esperd, ["run", "--config", str(tmp_path / "esperd.toml"), "--state-dir", str(tmp_path / "state")]) == 0
    return readers[0]


STRANGERS = '[network]\nlisten = "tcp://0.0.0.0:7412"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (STRANGERS + "curve = false\n", r"network.listen = .* is beyond loopback"),
        (STRANGERS, r"network.listen = .* nobody is allowed; first: esper keys allow NAME KEY --state-dir .*state"),
        ('[telemetry]\notlp_endpoint = "127.0.0.1:4318"\n', r"telemetry.otlp_endpoint is '127.0.0.1:4318'.* no HTTP address"),
        (f'[daemon]\nruntime_directory = "/{"r" * 120}"\n', r"set daemon.runtime_directory to a shorter one"),
    ],
)
def test_a_network_that_the_next_start_would_refuse_fails_the_check_and_the_reload(read_again, tmp_path, capsys, text, told):
    file, state = tmp_path / "esperd.toml", tmp_path / "state"
    assert read_again().state_directory == state
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_again()
    assert run(esperd, ["config", "check", "--config", str(file), "--state-dir", str(state)]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not state.exists()  # nothing was touched
    if text == STRANGERS:
        allow_list(state).allow("me", new_pair().public)
        assert read_again().network.listen
        server_key_file(state).write_text("spoilt")
        server_key_file(state).chmod(0o600)
        with pytest.raises(ConfigError, match="holds no secret key"):
            read_again()


@pytest.mark.asyncio
async def test_a_reload_that_cannot_read_who_may_connect_changes_nothing_and_is_told_to_the_manager(tmp_path):
    allow_list(tmp_path).directory.parent.mkdir()
    allow_list(tmp_path).directory.touch()  # no directory: as unreadable as one on a disk that fails
    config = Config(
        daemon=Daemon(state_directory=str(tmp_path), runtime_directory="/run/esperd"),
        network=Network(listen="tcp://127.0.0.1:7412"),
    )
    with pytest.raises(StoreFailed):
        require_startable(config)
    heard = []

    class Heard(Notifier):
        async def reloading(self):
            heard.append("reloading")

        async def ready(self, status):
            heard.append(status)

    async def standing():
        return Standing([], 0, 0)

    applied = []
    service = Service(
        Heard(),
        SystemClock(),
        standing,
        read_again=lambda: require_startable(config),
        in_force=Config,
        apply=applied.append,
    )
    await service.reload()
    assert applied == []
    assert heard[0] == "reloading"
    assert "reload failed, the configuration stays as it was: " in heard[1]
    assert "allowed cannot be read" in heard[1]
