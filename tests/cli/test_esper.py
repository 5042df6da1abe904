from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import anyio.from_thread
import msgspec
import pytest
import synthetic_job
from scripted_daemon import ACTORS, KERNELS, PLUGINS, ScriptedDaemon

from esperd import errors
from esperd.cli.client import esper
from esperd.cli.daemon import esperd
from esperd.cli.exit_codes import run
from esperd.messages.control import ActorList, PluginList
from esperd.messages.jobs import JobError, JobInfo, JobList, JobState, JobSubmitted
from esperd.messages.kernels import KernelList
from esperd.messages.reports import Report
from esperd.messages.telemetry import Event, JobStateChanged

EVENTS = synthetic_job.events()
JOB_FILE = 'host = "cnn"\ndata = "digits"\n[budget]\nepochs = 2\n'


@pytest.fixture
def daemon(tmp_path):
    daemon = ScriptedDaemon(tmp_path, log=EVENTS, state=JobState.SUCCEEDED)
    daemon.artifacts = {"model.safetensors": b"m" * 50, "report.json": msgspec.json.encode(synthetic_job.REPORT)}
    return daemon


@pytest.fixture
def job_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(JOB_FILE)
    return file


@contextlib.contextmanager
def serving(daemon):
    with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(daemon.running()):
        yield


def ran(daemon, *words):
    with serving(daemon):
        return run(esper, [*words, "--endpoint", daemon.endpoint])


@pytest.mark.parametrize(
    ("words", "type_"),
    [
        (["jobs"], JobList),
        (["actors"], ActorList),
        (["kernels"], KernelList),
        (["plugins"], PluginList),
        (["plugins", "list"], PluginList),
        (["pause", synthetic_job.JOB_ID], JobInfo),
        (["resume", synthetic_job.JOB_ID], JobInfo),
        (["cancel", synthetic_job.JOB_ID], JobInfo),
        (["report", synthetic_job.JOB_ID], Report),
    ],
)
def test_with_json_a_command_prints_the_reply_and_nothing_else(daemon, capsys, words, type_):
    assert ran(daemon, *words, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    msgspec.json.decode(out, type=type_)


def test_json_is_accepted_before_the_command_too(daemon, capsys):
    with serving(daemon):
        assert run(esper, ["--json", "--endpoint", daemon.endpoint, "actors"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=ActorList) == ACTORS


def test_watching_with_json_prints_one_event_a_line(daemon, capsys):
    assert ran(daemon, "watch", synthetic_job.JOB_ID, "--json", "--after", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [msgspec.json.decode(line, type=Event) for line in lines] == EVENTS[5:]


def test_in_a_pipe_watching_prints_plain_lines(daemon, capsys):
    assert ran(daemon, "watch", synthetic_job.JOB_ID) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "decision   cull features.7#1: contribution interval" in out
    assert out.splitlines()[-1] == "job        succeeded, attempt 1"


def test_a_watched_job_that_fails_ends_the_command_with_1(daemon, capsys):
    error = JobError(code="training_diverged", message="the loss became NaN at epoch 3")
    daemon.state = JobState.FAILED
    daemon.log = synthetic_job.numbered([JobStateChanged(state=JobState.FAILED, attempt=1, error=error)])
    assert ran(daemon, "watch", synthetic_job.JOB_ID) == 1
    assert capsys.readouterr().err == f"error: job {synthetic_job.JOB_ID} is failed\n"


def test_submit_prints_the_id_and_watch_follows(daemon, job_file, capsys):
    assert ran(daemon, "submit", str(job_file), "--key", "k", "--watch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"submitted {synthetic_job.JOB_ID}"
    assert lines[-1] == "job        succeeded, attempt 1"


def test_submit_with_json_prints_the_id_for_programs(daemon, job_file, capsys):
    assert ran(daemon, "submit", str(job_file), "--json") == 0
    submitted = msgspec.json.decode(capsys.readouterr().out, type=JobSubmitted)
    assert (submitted.id, submitted.duplicate) == (synthetic_job.JOB_ID, False)


def test_listings_are_plain_aligned_tables_in_a_pipe(daemon, capsys):
    for words, told in [
        (["jobs"], "digits <demo>"),
        (["actors"], "dead letters: 2 actor_unavailable"),
        (["actors"], "breakers: trainer/j1.1: policy open, asked again in 9 s\n"),
        (["kernels"], "since the daemon started: 3 from the cache, 1 compiled"),
        (["plugins"], "ImportError: no module named 'nowhere'"),
    ]:
        assert ran(daemon, *words) == 0
        out = capsys.readouterr().out
        assert told in out
        assert "\x1b" not in out


def test_changes_say_where_the_job_stands(daemon, capsys):
    daemon.state = JobState.PAUSED
    assert ran(daemon, "pause", synthetic_job.JOB_ID) == 0
    assert capsys.readouterr().out == f"pause of {synthetic_job.JOB_ID} recorded; it is paused\n"


def test_the_report_ends_with_the_verdict_on_growth(daemon, capsys):
    assert ran(daemon, "report", synthetic_job.JOB_ID) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("growth paid: +1.11 points of accuracy")


def test_the_report_is_written_as_one_page_when_asked(daemon, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert ran(daemon, "report", synthetic_job.JOB_ID, "--html", str(page)) == 0
    assert f"written {page}" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


def test_export_writes_the_model_and_names_the_files(daemon, tmp_path, capsys):
    target = tmp_path / "model"
    assert ran(daemon, "export", synthetic_job.JOB_ID, "--to", str(target), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["directory"] == str(target)
    assert sorted(told["files"]) == sorted(str(path) for path in target.iterdir())


def test_a_job_that_does_not_exist_ends_with_4_and_one_line(daemon, capsys):
    assert ran(daemon, "watch", "absent") == 4
    assert capsys.readouterr().err == "error: there is no job 'absent'; `esper jobs` lists them\n"


def test_an_error_with_json_is_an_object_on_stderr(daemon, capsys):
    assert ran(daemon, "pause", "absent", "--json") == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["code"] == "job_not_found"


def test_without_a_daemon_commands_end_with_3_and_say_how_to_start_one(tmp_path, capsys):
    assert run(esper, ["jobs", "--endpoint", f"ipc://{tmp_path}/control.sock"]) == 3
    err = capsys.readouterr().err
    assert "esperd run" in err
    assert len(err.splitlines()) == 1


def test_a_wrong_job_file_ends_with_2_before_a_daemon_is_needed(tmp_path, job_file, capsys):
    job_file.write_text(JOB_FILE.replace("epochs", "epohcs"))
    assert run(esper, ["submit", str(job_file), "--endpoint", f"ipc://{tmp_path}/control.sock"]) == 2
    assert "line 4: unknown key 'epohcs' in [budget]; did you mean 'epochs'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["watch"],
        ["jobs", "--limit", "0"],
        ["jobs", "--limit", str(10**30)],
        ["watch", "j1", "--after", str(2**63)],
        ["nosuch"],
        ["export", "x"],
    ],
)
def test_a_wrong_command_line_ends_with_2(words, capsys):
    assert run(esper, words) == 2
    assert run(esper, [*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["code"] == "usage"


def test_a_directory_that_cannot_be_written_ends_with_1(daemon, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert ran(daemon, "export", synthetic_job.JOB_ID, "--to", str(tmp_path / "file" / "below")) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")


def test_every_error_has_a_documented_exit_code():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for error in errors.EsperError.__subclasses__():
        assert error.exit_status in {1, 2, 3, 4, 5}
        assert f"`{error.code}`" in text, f"docs/cli.md does not say what {error.code} exits with"


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


def test_every_command_and_option_is_documented_and_takes_json():
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for program in (esper, esperd):
        for path, command in commands(program):
            assert f"`{program.name} {' '.join(path)}" in text
            options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
            assert hasattr(command, "commands") or "--json" in options
            assert all(f"`{name}" in text or f" {name}" in text for name in options)


@pytest.mark.parametrize("program", ["esperd.cli.client", "esperd.cli.daemon"])
def test_help_imports_nothing_heavy(program):
    probe = (
        "import sys, runpy\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{program}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'rich', 'transformers', 'matplotlib', 'zmq', 'msgspec', 'anyio', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "Usage:" in ended.stdout
    assert ended.stderr == "[]\n"


def test_commands_import_no_torch(daemon):
    probe = (
        "import sys\n"
        "from esperd.cli.client import esper\n"
        "from esperd.cli.exit_codes import run\n"
        f"code = run(esper, ['watch', '{synthetic_job.JOB_ID}', '--endpoint', '{daemon.endpoint}'])\n"
        "print(sorted({'torch', 'rich', 'matplotlib', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    with serving(daemon):
        ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ended.stderr == "[]\n"


def on_a_terminal(words):
    """What a command writes to a terminal, and its exit code."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "60"}
    process = subprocess.Popen([sys.executable, "-m", "esperd.cli.client", *words], stdout=slave, env=environment)
    os.close(slave)
    written = bytearray()
    with contextlib.suppress(OSError):  # reading from a terminal whose other end was closed
        while chunk := os.read(master, 65536):
            written += chunk
    os.close(master)
    return written.decode(), process.wait()


def test_on_a_terminal_watching_draws_a_picture(daemon):
    with serving(daemon):
        written, code = on_a_terminal(["watch", synthetic_job.JOB_ID, "--endpoint", daemon.endpoint])
    assert code == 0
    assert "● fossilized" in written
    assert "\x1b[36m" in written or "\x1b[32m" in written


def test_without_colour_a_terminal_gets_no_colours(daemon):
    with serving(daemon):
        written, code = on_a_terminal(["actors", "--no-color", "--endpoint", daemon.endpoint])
    assert code == 0
    assert "policy" in written
    assert "\x1b[3" not in written


def test_a_reader_that_has_enough_ends_the_command_quietly(daemon):
    command = f"{sys.executable} -m esperd.cli.client watch {synthetic_job.JOB_ID} --endpoint {daemon.endpoint} | head -1"
    with serving(daemon):
        ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert ended.stdout == "job        queued, attempt 0\n"
    assert ended.stderr == ""


def test_kernels_and_plugins_scripts_agree_with_what_is_listed(daemon, capsys):
    ran(daemon, "kernels", "--json")
    assert msgspec.json.decode(capsys.readouterr().out, type=KernelList) == KERNELS
    ran(daemon, "plugins", "--json")
    assert msgspec.json.decode(capsys.readouterr().out, type=PluginList) == PLUGINS
