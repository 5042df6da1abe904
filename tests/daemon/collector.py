"""A collector of traces, as OTLP over HTTP has it: what was sent is decoded and kept."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import NamedTuple


class Span(NamedTuple):
    trace: str
    id: str
    parent: str
    name: str
    service: str


class Collector:
    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.spans = []

    def take(self, body):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = [item.value.string_value for item in resource.resource.attributes if item.key == "service.name"]
            self.spans += [
                Span(span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, service)
                for scope in resource.scope_spans
                for span in scope.spans
            ]


@contextlib.contextmanager
def collecting():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
