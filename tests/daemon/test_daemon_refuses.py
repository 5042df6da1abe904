"""Bad input: a typed error that says what was wrong and what to do, and a daemon that goes on."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from daemon_jobs import PROJECT, job

from esperd.errors import InvalidJob, UnknownName, error_from_code
from esperd.messages.jobs import Job, JobState, JobSubmitted, SubmitJob


async def refusal(daemon, changes, error_class=InvalidJob):
    """What the daemon answers to a job that a careless client sends: nothing was checked on the way."""
    raw = msgspec.convert(job(epochs=2) | changes, Job)
    async with daemon.client() as esper:
        with pytest.raises(error_class) as refused:
            await esper.ask(SubmitJob(job=raw, idempotency_key=str(changes)), JobSubmitted)
        assert await esper.jobs() is not None  # it is still there
    return refused.value


@pytest.mark.parametrize(
    ("changes", "wrong", "exists"),
    [
        ({"host": "resnet152"}, "resnet152", "mlp"),
        ({"data": "mnist"}, "mnist", "digits"),
        ({"growth": {"blueprints": ["conv_hevy*"]}}, "conv_hevy*", "conv_heavy"),
        ({"growth": {"alpha_schedule": "steep"}}, "steep", "cosine"),
        ({"policy": {"strategy": "oracle"}}, "oracle", "ucb"),
        ({"policy": {"trigger": "plateaux"}}, "plateaux", "plateau"),
        ({"gates": {"blueprints": {"conv_ligth": {}}}}, "conv_ligth", "did you mean 'conv_light'?"),
    ],
)
@pytest.mark.asyncio
async def test_a_name_that_nothing_registered_is_refused_with_those_that_exist(daemon, changes, wrong, exists):
    error = await refusal(daemon, changes, UnknownName)
    assert wrong in error.message
    assert exists in error.message


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"budget": {}}, "budget", "needs a limit"),
        ({"split": {"gate": 0.6, "audit": 0.5}}, "split", "leave nothing to train on"),
        ({"workdir": "/no/such/folder"}, "workdir", "/no/such/folder"),
        ({"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": True}}, "optimizer.nesterov", "needs momentum"),
        ({"optimizer": {"options": {"amsgrad": True}}}, "optimizer.options", "amsgrad"),
        ({"gates": {"proof": "trial", "trial_epochs": 3.0}}, "gates.trial_epochs", "budget.epochs = 2"),
        ({"policy": {"plateau_release": 0.0}}, "policy.plateau_release", "policy.plateau_improvement = 0.01"),
        ({"workdir": "relative"}, "workdir", "relative"),
        ({"host_options": {"sizes": [{1: 2}]}}, "host_options.sizes.0", "the key 1"),
        ({"data": "missing.npz"}, "data", "missing.npz"),
        ({"python": "/no/such/python"}, "python", "No such file"),
        ({"python": "/bin/false"}, "python", "pip install esperd"),
    ],
)
@pytest.mark.asyncio
async def test_what_cannot_run_is_refused_before_it_is_admitted(daemon, changes, key, told):
    error = await refusal(daemon, changes)
    assert error.fields["key"] == key
    assert told in error.message


@pytest.fixture
def bare_python(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.asyncio
async def test_an_interpreter_without_esperd_is_refused_with_how_to_install_it(daemon, bare_python):
    error = await refusal(daemon, {"python": str(bare_python)})
    assert "No module named 'esperd'" in error.message
    assert f"{bare_python} -m pip install esperd==" in error.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('host = "mlp\n', "line 1"),
        ('host = "mlp"\ndata = "digits"\n[budget]\nepochs = 2\nepoch = 3\n', "line 5: unknown key 'epoch' in [budget]"),
        ('host = "mlp"\ndata = "digits"\n[budget]\nepochs = 0\n', "budget.epochs"),
        ('host = "mlp"\ndata = "digits"\n[budget]\n', "[budget] sets no end"),
        ('host = "mlp"\ndata = "digits"\nworkdir = "nowhere"\n[budget]\nepochs = 1\n', "nowhere is not a directory"),
    ],
)
@pytest.mark.asyncio
async def test_a_malformed_job_file_is_refused_with_its_place(daemon, tmp_path, text, told):
    file = tmp_path / "job.toml"
    file.write_text(text)
    async with daemon.client() as esper:
        before = {info.id for info in await esper.jobs()}
        with pytest.raises(InvalidJob) as refused:
            await esper.submit(file)
        assert {info.id for info in await esper.jobs()} == before
    assert told in refused.value.message


MISTAKES = {
    "does not import": ({"host": "broken_import:network"}, "import_failed", ["no_such_package_anywhere"]),
    "leaves the interpreter": ({"host": "networks:leaves"}, "import_failed", ["SystemExit", "usage: networks.py"]),
    "does not fit the loss": ({"host": "networks:sequence_output"}, "invalid_model", ["cross_entropy", "(4, 12, 1)"]),
    "slot pattern": ({"growth": {}, "slots": {"patterns": ["features.*"]}}, "unknown_name", ["features.*", "second"]),
    "overlapping splits": ({"data": "samples:overlapping"}, "invalid_data", ["50", "train", "audit"]),
}
"""What only the worker can find out, one of each kind (``tests/trainer`` has the others): changes to a good job, code of the
error, words of its message or traceback."""


@pytest.fixture(scope="module")
def outcomes(daemon):
    """Every mistaken job, submitted at once and waited for."""
    with daemon.sync_client() as esper:
        submitted = {name: esper.submit(job(epochs=1, name=name) | changes) for name, (changes, _, _) in MISTAKES.items()}
        return {name: handle.wait() for name, handle in submitted.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_users_fails_the_job_at_once_and_says_which(outcomes, mistake):
    _, code, words = MISTAKES[mistake]
    info = outcomes[mistake]
    assert (info.state, info.attempt, info.error.code) == (JobState.FAILED, 1, code)
    told = f"{info.error.message}\n{info.error.traceback}".lower()
    for word in words:
        assert word.lower() in told
    assert error_from_code(code, info.error.message).code == code


@pytest.mark.parametrize("mistake", ["does not import", "leaves the interpreter"])
def test_where_the_users_code_raised_the_traceback_names_its_line(outcomes, mistake):
    assert "Traceback" in outcomes[mistake].error.traceback
    assert f'File "{PROJECT}' in outcomes[mistake].error.traceback


def test_after_all_this_the_daemon_is_ready_and_holds_no_worker(daemon, outcomes):
    with daemon.sync_client() as esper:
        actors = {status.name: status.state.value for status in esper.actors().actors if not status.name.startswith("trainer/")}
    assert set(actors) == {"telemetry", "policy", "compiler", "cache", "jobs"}
    assert set(actors.values()) == {"running"}
