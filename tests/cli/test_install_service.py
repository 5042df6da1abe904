"""A systemd unit for this installation: what stands in it, where it lies, and that nobody's work is overwritten."""

from __future__ import annotations

import json
import shutil

import pytest

from esperd.cli import service
from esperd.cli.daemon import esperd
from esperd.cli.exit_codes import run
from esperd.config import load_config
from esperd.daemon.unit import Unit, is_edited
from esperd.errors import ConfigError, StateDirectoryUnusable, StoreFailed


def unit(**changes):
    return Unit(**{"scope": "user", "command": ["/opt/venv/bin/esperd"], "arguments": [], "drain_timeout_s": 90.0, **changes})


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_the_unit_outlasts_a_drain_and_lets_the_daemon_write_its_directories_only():
    lines = unit(scope="system", run_as="esperd", systemd=257).text().splitlines()
    for line in (
        "Type=notify-reload",
        "NotifyAccess=main",
        "ExecStart=/opt/venv/bin/esperd run",
        "TimeoutStopSec=120",
        "KillMode=mixed",
        "User=esperd",
        "StateDirectory=esperd",
        "RuntimeDirectory=esperd",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
        "UMask=0077",
    ):
        assert line in lines
    assert not any(line.startswith("ReadWritePaths") for line in lines)


def test_a_service_that_failed_is_started_again_for_ever_but_for_a_wrong_configuration():
    lines = unit().text().splitlines()
    # Without a limit, so that a disk that was mended after a week finds a manager that still tries; with a pause, so that it may.
    assert {"Restart=on-failure", "StartLimitIntervalSec=0", "RestartSec=10"} <= set(lines)
    prevents = {line for line in lines if line.startswith("RestartPreventExitStatus")}
    assert prevents == {f"RestartPreventExitStatus={ConfigError.exit_status}"}
    assert StateDirectoryUnusable.exit_status == ConfigError.exit_status != StoreFailed.exit_status
    # Its exit code would not count: RestartPreventExitStatus= looks at the main process alone.
    assert not any(line.startswith("ExecStartPre") for line in lines)


def test_a_job_out_of_memory_ends_no_service_and_no_limit_of_the_unit_ends_a_job():
    lines = unit().text().splitlines()
    assert "OOMPolicy=continue" in lines
    assert not any(line.startswith("Memory") for line in lines)


def test_a_system_service_that_listens_on_the_network_waits_for_it():
    waits = {"Wants=network-online.target", "After=network-online.target"}
    assert waits <= set(unit(scope="system", listens=True).text().splitlines())
    for made in (unit(scope="system"), unit(listens=True)):  # a user's manager has no such target
        assert waits.isdisjoint(made.text().splitlines())


def test_an_older_systemd_is_told_how_to_reload():
    lines = unit(systemd=252).text().splitlines()
    assert "Type=notify" in lines
    assert "ExecReload=/bin/kill -HUP $MAINPID" in lines


def test_words_with_blanks_percents_and_dollars_stay_what_they_are():
    text = unit(arguments=["--config", '/my files/100%/$a/"b".toml']).text()
    assert r'run --config "/my files/100%%/$$a/\"b\".toml"' in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path):
    command = [shutil.which("true")]  # one that is there: it is looked for
    state = tmp_path / "with a blank"
    for made in (unit(command=command, systemd=252, state_directory=state), unit(command=command, systemd=252, scope="system")):
        assert service.verified(made) == []
    assert service.verified(unit(command=["/no/such/esperd"], systemd=252)) != []


def test_a_unit_is_replaced_unless_somebody_edited_it(home, capsys):
    path = home / "config/systemd/user/esperd.service"
    assert run(esperd, ["install-service", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["written"]) == (str(path), True)
    assert "systemctl --user enable --now esperd.service" in told["commands"]
    assert f"--state-dir {home}/state/esperd" in path.read_text()
    assert f"ReadWritePaths=-{home}/state/esperd" in path.read_text()
    assert (home / "state/esperd").is_dir()  # a sandbox opens only what is there

    file = home / "esperd.toml"
    file.write_text("[daemon]\ndrain_timeout_s = 300\n")
    assert run(esperd, ["install-service", "--config", str(file)]) == 0
    assert "TimeoutStopSec=330" in path.read_text()
    assert not is_edited(path.read_text())

    edited = path.read_text().replace("WatchdogSec=60", "WatchdogSec=600")
    path.write_text(edited)
    assert run(esperd, ["install-service", "--user"]) == 5
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == edited
    assert run(esperd, ["install-service", "--print"]) == 0
    assert path.read_text() == edited
    assert run(esperd, ["install-service", "--force"]) == 0
    assert "WatchdogSec=60\n" in path.read_text()


def test_a_system_unit_uses_what_is_configured(home, capsys):
    file = home / "esperd.toml"
    file.write_text('[network]\nlisten = "tcp://192.0.2.1:7412"\n')
    words = ["install-service", "--system", "--run-as", "grower", "--state-dir", "/srv/esperd", "--print", "--json"]
    words += ["--config", str(file)]
    assert run(esperd, words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["written"]) == ("/etc/systemd/system/esperd.service", False)
    lines = told["unit"].splitlines()
    assert {"User=grower", "ReadWritePaths=-/srv/esperd", "RuntimeDirectory=esperd", "Wants=network-online.target"} <= set(lines)
    assert "StateDirectory=esperd" not in lines


def test_each_value_of_the_configuration_says_where_it_comes_from(tmp_path, capsys, monkeypatch):
    file = tmp_path / "esperd.toml"
    file.write_text("[jobs]\nmax_running = 2\nmax_queued = 7\n")
    monkeypatch.setenv("ESPERD__JOBS__MAX_QUEUED", "8")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    words = ["config", "show", "--origin", "--config", str(file), "--state-dir", str(tmp_path)]
    assert run(esperd, [*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["jobs"]["max_running"] == {"value": 2, "origin": f"file {file}"}
    assert shown["jobs"]["max_queued"] == {"value": 8, "origin": "variable ESPERD__JOBS__MAX_QUEUED"}
    assert shown["jobs"]["backoff_s"] == {"value": 1.0, "origin": "default"}
    assert shown["daemon"]["state_directory"] == {"value": str(tmp_path), "origin": "option --state-dir"}
    assert shown["daemon"]["runtime_directory"]["origin"] == "default, so variable RUNTIME_DIRECTORY counts"
    assert run(esperd, words) == 0
    file.write_text(capsys.readouterr().out)
    assert load_config(file, {}).jobs.max_queued == 8
    assert load_config(file, {}).runtime_directory == tmp_path / "run"
