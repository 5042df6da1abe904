from __future__ import annotations

import random
import socket
import subprocess
import sys

import pytest
import structlog

from esperd import tracing
from esperd.actors.actor import Actor, handles
from esperd.actors.spec import ChildSpec
from esperd.actors.system import ActorSystem
from esperd.errors import ConfigError
from esperd.messages import Done
from esperd.messages.control import ListActors
from esperd.messages.telemetry import GetEvents

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_a_collector_a_span_does_nothing_and_opentelemetry_is_not_imported():
    program = """
import sys
from esperd import tracing
with tracing.exporting("", "esperd"), tracing.span("a", parent="00-1-2-3"), tracing.step_span("b"):
    assert tracing.current() == ""
assert tracing.span("a") is tracing.span("b")
import esperd.daemon.process, esperd.client, esperd.cli.client
sys.exit(any(name.startswith("opentelemetry") for name in sys.modules))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://localhost:4317", "http://"])
def test_an_endpoint_that_is_no_http_address_is_a_configuration_error(endpoint):
    with pytest.raises(ConfigError, match=r"no HTTP address; .*http://127\.0\.0\.1:4318") as refused:
        tracing.require_collector(endpoint)
    assert refused.value.fields["key"] == "telemetry.otlp_endpoint"


def test_an_endpoint_without_the_extra_is_a_configuration_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tracing, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r'pip install "esperd\[otel\]", or leave the key empty'):
        tracing.require_collector("http://127.0.0.1:4318")


def test_a_collector_that_is_away_ends_no_block():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with tracing.exporting(closed, "esperd"), tracing.span("work"):
        assert len(tracing.current()) == 55


def test_spans_and_a_collector_that_is_away_draw_nothing_from_the_jobs_random_numbers():
    """They would make a traced job train otherwise than an untraced one."""
    random.seed(7)
    before = random.getstate()
    with tracing.exporting("http://127.0.0.1:9", "esperd trainer"), tracing.span("trainer epoch"):
        first = tracing.current()
    assert random.getstate() == before
    with tracing.exporting("http://127.0.0.1:9", "esperd trainer"), tracing.span("trainer epoch"):
        assert tracing.current() != first


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [(PARENT, True), (PARENT[:-2] + "00", False), (PARENT[:-2] + "03", True), ("", False), ("1", False)],
)
def test_whether_a_trace_is_wanted_is_read_from_its_flags(traceparent, sampled):
    assert tracing.is_sampled(traceparent) is sampled


class Logger(Actor):
    def __init__(self) -> None:
        self.bound = []

    @handles(GetEvents)
    async def about_a_job(self, _message: GetEvents) -> Done:
        self.bound.append((structlog.contextvars.get_contextvars(), tracing.current()))
        return Done()

    @handles(ListActors)
    async def about_none(self, _message: ListActors) -> Done:
        self.bound.append((structlog.contextvars.get_contextvars(), tracing.current()))
        return Done()


@pytest.mark.asyncio
async def test_what_a_handler_logs_carries_its_actor_and_job_and_the_trace_that_it_goes_on():
    logger = Logger()
    async with ActorSystem() as system:
        await system.start(ChildSpec("telemetry", lambda: logger))
        await system.ask("telemetry", GetEvents(job="j1"))
        with tracing.exporting("http://127.0.0.1:9", "esperd"):
            with tracing.span("daemon GetEvents", parent=PARENT):
                await system.ask("telemetry", GetEvents(job="j2"))
            await system.ask("telemetry", ListActors())
    (untraced, nothing), (traced, span), (other, none) = logger.bound
    trace_id = PARENT.split("-")[1]
    assert (untraced, nothing) == ({"actor": "telemetry", "generation": 1, "job": "j1"}, "")
    assert traced == {"actor": "telemetry", "generation": 1, "job": "j2", "trace_id": trace_id}
    assert span.split("-")[1] == trace_id
    assert span != PARENT
    assert (other, none) == ({"actor": "telemetry", "generation": 1}, "")  # nobody traced it, and it began no trace
