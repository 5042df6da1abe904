from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from esperd.cli import demo
from esperd.cli.daemon import esperd
from esperd.cli.demo import demo_job, is_demo
from esperd.cli.exit_codes import run
from esperd.cli.own_daemon import LOG_FILE, own_daemon
from esperd.daemon.lock import locked
from esperd.errors import ConfigError, MissingExtra, StateDirectoryLocked
from esperd.messages.jobs import Budget, Job, JobState


def test_the_demo_job_asks_for_a_control_and_takes_seed_and_epochs_from_the_command_line(tmp_path):
    job = demo_job(tmp_path)
    assert (job.host, job.data, job.control, job.workdir) == ("cnn", "digits", True, str(tmp_path))
    changed = demo_job(tmp_path, rng_seed=7, epochs=3)
    assert (changed.rng_seed, changed.budget.epochs) == (7, 3)


def test_without_its_extras_the_demo_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(MissingExtra, match=r'no-such-package: pip install "esperd\[demo\]"'):
        demo.run_demo(None, tmp_path, tmp_path / "state")


@pytest.mark.asyncio
async def test_a_daemon_of_ones_own_answers_and_ends_with_the_block(tmp_path):
    async with own_daemon(tmp_path / "state") as esper:
        pid = esper.daemon.pid
        assert await esper.jobs() == ()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with locked(tmp_path / "state", tmp_path):
        pass  # the lock is free


@pytest.mark.asyncio
async def test_a_state_directory_of_another_daemon_is_refused_with_its_process_id(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    with locked(state, tmp_path), pytest.raises(StateDirectoryLocked, match=str(os.getpid())):
        async with own_daemon(state):
            pass


@pytest.mark.asyncio
async def test_a_path_too_long_for_a_socket_is_no_obstacle(tmp_path):
    state = tmp_path / ("long" * 25)
    async with own_daemon(state) as esper:
        assert str(state) not in esper.endpoint
        runtime = Path(esper.endpoint.removeprefix("ipc://")).parent
        assert runtime.exists()
    assert not runtime.exists()


@pytest.mark.asyncio
async def test_what_a_daemon_ended_with_is_raised(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPERD__JOBS__MAX_RUNNING", "0")
    with pytest.raises(ConfigError, match="max_running"):
        async with own_daemon(tmp_path / "state"):
            pass
    assert "max_running" in (tmp_path / "state" / LOG_FILE).read_text()


def started(directory, *words):
    command = [sys.executable, "-m", "esperd.cli.daemon", "demo", "--output", str(directory), *words]
    # Tests that run in the background of a shell ignore SIGINT, and so would whatever they start.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)


def test_the_demo_leaves_report_and_model_and_says_last_whether_growth_paid(tmp_path):
    process = started(tmp_path, "--epochs", "2", "--rng-seed", "3")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1].startswith(("growth paid: ", "growth did not pay: ", "no difference shown: "))
    assert lines[-2].startswith("kernels  since the daemon started: ")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"model.safetensors", "growth.json", "README.md"}


@pytest.mark.parametrize("stopped_by", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_demo_ends_its_job_and_its_daemon(tmp_path, stopped_by):
    process = started(tmp_path, "--json", "--epochs", "100000")
    states = (json.loads(line)["body"].get("state") for line in process.stdout)
    assert "running" in states  # reads until the job runs
    process.send_signal(stopped_by)
    _, err = process.communicate()
    assert process.returncode == 130
    assert json.loads(err)["error"]["code"] == "interrupted"

    async def jobs():
        async with own_daemon(tmp_path / "state") as esper:
            return [job.state for job in await esper.jobs()]

    assert asyncio.run(jobs()) == [JobState.CANCELLED]


def test_a_demo_knows_its_own_jobs_from_others(tmp_path):
    demos = demo_job(tmp_path)
    assert is_demo(demo_job(tmp_path / "other", rng_seed=7, epochs=3), demos)
    assert not is_demo(msgspec.structs.replace(demos, name="mine"), demos)
    assert not is_demo(msgspec.structs.replace(demos, batch_size=7), demos)


def test_a_state_directory_with_somebodys_unfinished_job_is_refused_and_the_job_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPERD__WORKERS__START_TIMEOUT_S", "1")  # nobody is to train it here
    state = tmp_path / "state"
    mine = Job(host="cnn", data="digits", name="mine", workdir=str(tmp_path), budget=Budget(epochs=1))

    async def paused(esper):
        handle = await esper.submit(mine)
        await handle.pause()
        return handle.id

    async def with_daemon(work):
        async with own_daemon(state) as esper:
            return await work(esper)

    job_id = asyncio.run(with_daemon(paused))
    process = started(tmp_path, "--state-dir", str(state), "--epochs", "1")
    _, err = process.communicate()
    assert process.returncode == 2
    assert f"unfinished jobs that no demo submitted ({job_id})" in err

    async def states(esper):
        return [job.state for job in await esper.jobs()]

    assert asyncio.run(with_daemon(states)) == [JobState.PAUSED]


def test_the_configuration_is_checked_and_shown(tmp_path, capsys, monkeypatch):
    file = tmp_path / "esperd.toml"
    file.write_text("[jobs]\nmax_running = 2\n")
    assert run(esperd, ["config", "check", "--config", str(file)]) == 0
    assert capsys.readouterr().out == f"{file} is right\n"
    for words in (["check", "--json"], ["--json", "check"]):
        assert run(esperd, ["config", *words, "--config", str(file)]) == 0
        assert json.loads(capsys.readouterr().out) == {"ok": True, "config": str(file)}
    monkeypatch.setenv("ESPERD__HTTP__PORT", "0")
    assert run(esperd, ["config", "show", "--config", str(file), "--state-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "max_running = 2" in shown
    assert f"# state directory: {tmp_path}" in shown
    file.write_text(shown)
    assert run(esperd, ["config", "show", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["http"]["port"] == 0


def test_a_wrong_configuration_ends_with_2(tmp_path, capsys):
    file = tmp_path / "esperd.toml"
    file.write_text("[jobs]\nmax_runing = 2\n")
    assert run(esperd, ["config", "check", "--config", str(file)]) == 2
    assert "max_runing" in capsys.readouterr().err
    assert run(esperd, ["run", "--config", str(file)]) == 2
    assert run(esperd, ["config", "check", "--state-dir", str(tmp_path / ("long" * 30))]) == 2
