"""Traces: what one request led to, through every process, as OpenTelemetry spans. Off unless a collector is configured.

Off, nothing of OpenTelemetry is imported and a span is a block that does nothing. What crosses a process edge is W3C's
``traceparent`` (https://www.w3.org/TR/trace-context/), in the head of a message: it names the span that the receiver goes on
from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import esperd
from esperd.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

LONGEST_TRACEPARENT = 128
"""Characters; version 00 has 55, and later ones may append to it."""
EXPORT_TIMEOUT_S = 10.0
"""For one batch of spans, tries included; OpenTelemetry's own default."""
LAST_TRIES_S, LAST_SPANS_S = 1.0, 5.0
"""A process that ends tries again this long where its collector refuses, and waits this long for one that is slow: it must not
be held up by one that is away. Chosen, not measured."""

_REQUIRED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_OFF = contextlib.nullcontext()


class _State:
    """Of this process: who makes its spans; None while nobody does."""

    tracer: Tracer | None = None
    every_step: bool = False


def is_installed() -> bool:
    """Whether the extra ``esperd[otel]`` is there."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in _REQUIRED)
    except ModuleNotFoundError:  # of a parent package
        return False


def require_collector(endpoint: str) -> None:
    """Check that spans could be sent there; an empty endpoint asks for none.

    Raises:
        ConfigError: when it is no HTTP address, or the extra ``esperd[otel]`` is not installed.
    """
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"telemetry.otlp_endpoint is {endpoint!r}, which is no HTTP address; it is that of an OTLP collector, as in "
            "http://127.0.0.1:4318",
            key="telemetry.otlp_endpoint",
            value=endpoint,
        )
    if not is_installed():
        raise ConfigError(
            f"telemetry.otlp_endpoint is {endpoint}, and OpenTelemetry is not installed in {sys.prefix}; "
            'pip install "esperd[otel]", or leave the key empty',
            key="telemetry.otlp_endpoint",
            value=endpoint,
        )


@contextlib.contextmanager
def exporting(endpoint: str, service: str, *, every_step: bool = False) -> Iterator[None]:
    """Make spans, and send them to a collector, until the block ends. What waits then is sent, as far as it takes it.

    Args:
        endpoint: of an OTLP collector over HTTP, without ``/v1/traces``; empty: no spans are made.
        service: what this process is called in traces: ``esperd`` for the daemon.
        every_step: whether :func:`step_span` makes spans, too.

    Raises:
        ConfigError: see :func:`require_collector`.
    """
    require_collector(endpoint)
    if not endpoint:
        yield
        return
    provider, exporter = _provider(endpoint, service)
    before = (_State.tracer, _State.every_step)
    _State.tracer, _State.every_step = provider.get_tracer("esperd", esperd.__version__), every_step
    try:
        yield
    finally:
        _State.tracer, _State.every_step = before
        _send_the_last(provider, exporter)


def span(name: str, *, parent: str = "", **attributes: str | float | bool) -> AbstractContextManager[None]:
    """A block that is a span, when this process makes any; its exception is the span's.

    Args:
        name: what is done, few in number: it is grouped by.
        parent: the ``traceparent`` to go on from; empty: the span around this one, else a trace of its own.
        attributes: about this one; their names get the prefix ``esperd.``.
    """
    if _State.tracer is None:
        return _OFF
    return _span(_State.tracer, name, parent, {f"esperd.{key}": value for key, value in attributes.items()})


def step_span(name: str) -> AbstractContextManager[None]:
    """A span of something so frequent that it is one only where that was asked for."""
    return span(name) if _State.every_step else _OFF


def current() -> str:
    """The ``traceparent`` of the span around the caller, ours or of a program that traces itself; empty: there is none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    found = trace.get_current_span().get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}" if found.is_valid else ""


def is_sampled(traceparent: str) -> bool:
    """Whether whoever made this ``traceparent`` wants to see what follows. A process that only serves it may do without spans."""
    flags = traceparent.rpartition("-")[2]
    return len(flags) == len("01") and flags.isalnum() and flags[1] in "13579bdf"


@contextlib.contextmanager
def _span(tracer: Tracer, name: str, parent: str, attributes: dict[str, str | int | float | bool]) -> Iterator[None]:
    import structlog  # not above: it imports rich, which a command that draws nothing does without
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # What is no traceparent begins a trace of its own, as the standard has it.
    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with tracer.start_as_current_span(name, context=context, attributes=attributes) as made:
        trace_id = f"{made.get_span_context().trace_id:032x}"
        with structlog.contextvars.bound_contextvars(trace_id=trace_id):
            yield


def _send_the_last(provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
    sending = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
    sending.start()
    sending.join(LAST_TRIES_S)
    if sending.is_alive():
        give_up: Callable[[], object] = exporter.shutdown
        give_up()  # it ends the wait between two tries
        sending.join(LAST_SPANS_S - LAST_TRIES_S)


def _leave_the_global_rng_alone() -> None:
    """Give OpenTelemetry randomness of its own.

    It draws ids of spans, and pauses between tries, from the global ``random``. In a trainer that is a stream of the job: it
    would train otherwise with traces than without, and after two seedings alike spans would have the same ids.
    """
    own = random.SystemRandom()
    for name, module in list(sys.modules.items()):
        if name.startswith("opentelemetry.") and getattr(module, "random", None) is random:
            module.random = own  # type: ignore[attr-defined]


def _provider(endpoint: str, service: str) -> tuple[TracerProvider, OTLPSpanExporter]:
    """OpenTelemetry's own ``OTEL_…`` variables (sampling, headers, batches) count as everywhere."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _leave_the_global_rng_alone()
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.version": esperd.__version__}), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter
