"""The example plugin, installed as a stranger would, in an environment that has never seen it; and broken ones beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from esperd.messages.growth import Stage
from esperd.messages.jobs import Budget, Growth, Job, JobState
from esperd.messages.policy import PolicySettings
from esperd.messages.telemetry import DecisionMade, KernelLoaded, StageChanged
from esperd.testing import running_daemon

EXAMPLE = Path(__file__).parents[2] / "plugins" / "esperd-example-blueprint"
FILES = {
    "fails_on_import": "import a_module_that_is_not_there",
    "fails_in_hook": """
        from esperd import hookimpl

        @hookimpl
        def esperd_blueprints():
            raise LookupError("the blueprints are lost")
        """,
    "returns_junk": """
        from esperd import hookimpl

        @hookimpl
        def esperd_blueprints():
            return ["eca"]
        """,
    "takes_a_name": """
        from esperd import hookimpl
        from esperd.declarations import Host

        @hookimpl
        def esperd_hosts():
            return [Host(name="cnn", factory="nowhere:nothing", description="not the real one")]
        """,
    "fails_while_observing": """
        from esperd import hookimpl

        @hookimpl
        def esperd_stage_changed(job, change):
            raise LookupError(f"no idea what {change.after} means")
        """,
    "observes": """
        import os
        from pathlib import Path
        from esperd import hookimpl

        def note(*words):
            with Path(os.environ["OBSERVED"]).open("a") as file:
                print(*words, file=file)

        @hookimpl
        def esperd_job_started(job):
            note("started", job.id)

        @hookimpl
        def esperd_decision(job, decision):
            note("decision", job)

        @hookimpl
        def esperd_stage_changed(change):
            note("stage", change.seed, change.after)

        @hookimpl
        def esperd_job_finished(job):
            note("finished", job.id, job.state)
        """,
}
"""Entry modules of plugins that come as a module and a dist-info, so that they need no installing."""

BROKEN = {
    "fails-on-import": "No module named 'a_module_that_is_not_there'",
    "fails-in-hook": "LookupError: the blueprints are lost",
    "returns-junk": "esperd_blueprints must return Blueprints, got 'eca'",
    "takes-a-name": "the name 'cnn' is already taken among hosts",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Interpreter of an environment that sees this one's packages, with the example installed from its folder, offline."""
    environment = tmp_path_factory.mktemp("fresh")
    # This environment's pip is seen too; giving the new one its own (ensurepip) would take longer than all the rest.
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", environment], check=True, capture_output=True
    )
    python = environment / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    # addsitedir, because esperd itself may be installed here by a .pth file (editable).
    (packages / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*install, *offline, EXAMPLE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (packages / "esperd_example_blueprint").is_dir()
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What stands on the daemon's PYTHONPATH."""
    folder = tmp_path_factory.mktemp("plugins")
    for module, source in FILES.items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        name = module.replace("_", "-")
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[esperd]\n{name} = {module}\n")
    return folder


@pytest.fixture(scope="module")
def daemon(python, folder, tmp_path_factory):
    """A daemon in that environment, with every plugin there is."""
    environment = {"PYTHONPATH": str(folder), "OBSERVED": str(folder / "observed")}
    with running_daemon(tmp_path_factory.mktemp("state"), python=python, environment=environment) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def finished(daemon):
    """A job that may grow nothing but the example, when it is over: what became of it, and its events."""
    job = Job(
        host="cnn",
        data="digits",
        budget=Budget(epochs=8),
        growth=Growth(
            blueprints=("eca",), incubation_epochs=1, blending_epochs=1, shadowing_epochs=1, probation_epochs=1, embargo_epochs=1
        ),
        policy=PolicySettings(warmup_epochs=1),
    )
    with daemon.sync_client() as esper:
        handle = esper.submit(job)
        events = [event.body for event in handle.watch()]
        return handle.info(), events


def esper(python, *words):
    done = subprocess.run([python, "-m", "esperd.cli.client", *words, "--json"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def records(python, daemon):
    return {record["name"]: record for record in esper(python, "plugins", "--endpoint", daemon.endpoint)["plugins"]}


def test_the_installed_example_is_seen_by_esper_plugins(python, daemon):
    record = records(python, daemon)["example-blueprint"]
    assert record["distribution"] == "esperd-example-blueprint 0.1.0"
    assert record["registered"] == {"blueprints": ["eca"]}
    assert record.get("error") is None


def test_the_installed_example_passes_esper_plugins_check(python):
    proof = esper(python, "plugins", "check", "eca")
    assert proof["passed"]
    assert {"identity", "gradient", "learns", "parameter_formula", "flop_formula"} <= {check["name"] for check in proof["checks"]}


def test_a_job_grows_a_seed_of_the_installed_example(finished):
    info, events = finished
    assert info.state is JobState.SUCCEEDED, info.error
    loaded = [body for body in events if isinstance(body, KernelLoaded)]
    assert loaded
    assert {body.blueprint for body in loaded} == {"eca"}
    reached = {body.after for body in events if isinstance(body, StageChanged) and body.seed == loaded[0].seed}
    assert {Stage.GERMINATED, Stage.TRAINING} <= reached


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_listed_with_its_traceback_and_the_daemon_lives(python, daemon, name):
    record = records(python, daemon)[name]
    assert record["distribution"] == f"{name} 1.0"
    assert record["registered"] == {}
    assert record["error"].startswith("Traceback")
    assert BROKEN[name] in record["error"]


def test_a_plugin_that_raises_while_it_observes_is_listed_and_the_job_goes_on(python, daemon, finished):
    info, _ = finished
    assert info.state is JobState.SUCCEEDED
    record = records(python, daemon)["fails-while-observing"]
    assert re.search(r"LookupError: no idea what \w+ means", record["error"])


def test_an_observing_plugin_hears_the_whole_story_of_a_job(finished, folder):
    info, events = finished
    heard = (folder / "observed").read_text().splitlines()
    assert heard[0] == f"started {info.id}"
    assert heard[-1] == f"finished {info.id} succeeded"
    stages = [f"stage {body.seed} {body.after}" for body in events if isinstance(body, StageChanged)]
    assert [line for line in heard if line.startswith("stage")] == stages
    decisions = [body for body in events if isinstance(body, DecisionMade)]
    assert heard.count(f"decision {info.id}") == len(decisions)


def test_the_examples_own_tests_pass_where_it_is_installed(python):
    tests = [python, "-m", "pytest", "-q", "-p", "no:anyio", "-p", "no:cacheprovider", EXAMPLE / "tests"]
    done = subprocess.run(tests, check=False, capture_output=True, text=True, cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout
