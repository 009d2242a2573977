"""Tests of the spans that a collector gets: GenAI names, the request id, the client's trace, no text of the prompt."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from deployments.observability.tracing import ENDPOINT_VARIABLES
from tests.support.fakes import failing
from tests.support.gateway import Gateway

SECRET = "canary-7f3a"
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(ThreadingHTTPServer):
    """An OTLP collector that keeps what it receives."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                self.bodies.append(
                    handler.rfile.read(int(handler.headers["content-length"]))
                )
                handler.send_response(200)
                handler.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans(self) -> list[dict[str, Any]]:
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for span in (
                    span for scope in resource.scope_spans for span in scope.spans
                ):
                    values = {
                        a.key: getattr(a.value, a.value.WhichOneof("value"))
                        for a in span.attributes
                    }
                    found.append(
                        {
                            "name": span.name,
                            "trace": span.trace_id.hex(),
                            "span": span,
                            **values,
                        }
                    )
        return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    monkeypatch.setenv(
        "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    yield server
    server.shutdown()
    server.server_close()


def ask(gateway: Gateway, text: str, trace: str = "", **body: Any) -> Any:
    headers = {
        "x-request-id": "req-1",
        **({"traceparent": f"00-{trace}-b7ad6b7169203331-01"} if trace else {}),
    }
    given = {"model": "large", "messages": [{"role": "user", "content": text}], **body}
    return gateway.client.post("/v1/chat/completions", json=given, headers=headers)


def test_each_answer_is_a_span_with_the_genai_names(
    collector: Collector, tmp_path: Path
) -> None:
    """A span has tokens, model, operation, decision and request id, is in the client's trace and has no text."""
    gateway = Gateway(tmp_path)
    with gateway.client:
        answer = ask(gateway, f"What is {SECRET}?", TRACE)
        ask(gateway, f"What is {SECRET}?", TRACE, stream=True)
        gateway.models["large"].script = failing(ValueError(f"cannot parse {SECRET}"))
        ask(gateway, f"What is {SECRET}?")
        assert gateway.ingress.dispatcher.spans is not None
        gateway.ingress.dispatcher.spans.provider.shutdown()
    spans = collector.spans()
    assert [span["name"] for span in spans] == ["chat large"] * 3
    first, streamed, failed = spans
    assert (
        first["gen_ai.request.model"] == "large"
        and first["gen_ai.operation.name"] == "chat"
    )
    assert (
        first["gen_ai.usage.input_tokens"],
        first["gen_ai.usage.output_tokens"],
    ) == (7, 2)
    assert first["gen_ai.response.id"] == answer.headers["x-router-decision-id"]
    assert {span["router.request_id"] for span in spans} == {"req-1"}
    assert first["trace"] == streamed["trace"] == TRACE != failed["trace"]
    assert first["span"].parent_span_id.hex() == "b7ad6b7169203331"
    assert first["span"].end_time_unix_nano > first["span"].start_time_unix_nano
    assert streamed["gen_ai.response.time_to_first_chunk"] > 0
    assert failed["error.type"] == "error" and failed["span"].status.code == 2
    assert all(SECRET.encode() not in body for body in collector.bodies)


def test_without_an_endpoint_there_is_no_tracer(gateway: Gateway) -> None:
    """There is no exporter and no thread, and requests make no calls for tracing."""
    assert not any(map(os.environ.get, ENDPOINT_VARIABLES))
    assert gateway.ingress.dispatcher.spans is None
    assert gateway.chat().status_code == 200


def test_an_unreachable_collector_does_not_affect_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans are lost, answers are not."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    gateway = Gateway(tmp_path)
    with gateway.client:
        assert [gateway.chat().status_code for _ in range(20)] == [200] * 20
        assert gateway.ingress.dispatcher.spans is not None
