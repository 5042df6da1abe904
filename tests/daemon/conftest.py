"""One daemon for every test that does it no harm; tests that stop or kill one start their own."""

from __future__ import annotations

import msgspec
import pytest
from collector import collecting
from daemon_jobs import QUICK

from esperd import tracing
from esperd.config import Telemetry
from esperd.testing import running_daemon

OBSERVER = """
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_job_started(job):
    if job.name == "observed":
        raise RuntimeError("this observer looks away")
"""


def install(directory, name, code):
    """What pip leaves of a package: its module and the entry point that names it."""
    (directory / f"{name}.py").write_text(code)
    metadata = directory / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[esperd]\n{name} = {name}\n")


@pytest.fixture(scope="session")
def collector():
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def daemon(tmp_path_factory, collector):
    """It traces what its client traces, where OpenTelemetry is installed; a test that needs it says so itself."""
    endpoint = collector.endpoint if tracing.is_installed() else ""
    config = msgspec.structs.replace(QUICK, telemetry=Telemetry(otlp_endpoint=endpoint, trace_steps=True))
    packages = tmp_path_factory.mktemp("packages")
    install(packages, "observer", OBSERVER)
    install(packages, "unfinished", "import no_such_package_anywhere\n")
    environment = {"PYTHONPATH": str(packages), "OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with running_daemon(tmp_path_factory.mktemp("shared") / "state", config, environment=environment) as daemon:
        yield daemon
