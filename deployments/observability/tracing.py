"""OpenTelemetry spans, one for each answer of a model, named by the GenAI semantic conventions.

Tracing is off unless OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set. Spans contain no text
of prompts or answers. If a client sends a `traceparent`, its trace is the parent. A thread sends the spans from a
bounded queue; while the collector is unreachable, spans are lost and requests are not affected.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from deployments.observability import logs
from policies.events import FORCED, Decision, Outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AnyValue

# variables of the environment that name a collector
ENDPOINT_VARIABLES = (
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)
OPERATIONS = {"chat": "chat", "completion": "text_completion", "embed": "embeddings"}
PARENT: ContextVar["Context | None"] = ContextVar("parent", default=None)


class Tracer:
    """Sends the spans of one ingress replica. The OpenTelemetry SDK is imported only when a tracer is created."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import (
            TraceContextTextMapPropagator,
        )

        name = os.environ.get("OTEL_SERVICE_NAME", "adaptive-llm-router")
        # Ray has set the global provider, so the tracer has its own
        resource = Resource.create({"service.name": name})
        self.provider = TracerProvider(resource=resource)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer(__name__)
        self._propagator = TraceContextTextMapPropagator()
        self._client = SpanKind.CLIENT
        self._error = StatusCode.ERROR

    @classmethod
    def from_env(cls) -> "Tracer | None":
        """A tracer if the environment names a collector, else None."""
        return (
            cls() if any(os.environ.get(name) for name in ENDPOINT_VARIABLES) else None
        )

    def start(self, headers: Mapping[str, str]) -> None:
        """Start a request: the trace in its headers becomes the parent of the spans in this context."""
        PARENT.set(self._propagator.extract(headers))

    def finish(self, decision: Decision, outcome: Outcome) -> None:
        """Send the span of a decision whose answer ended or failed."""
        operation = OPERATIONS[decision.profile.task]
        end_ns = time.time_ns()
        forced = decision.fallback == FORCED
        fallback = "none" if forced else decision.fallback or "none"
        attributes: dict[str, AnyValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": decision.arm,
            "gen_ai.response.model": decision.arm,
            "gen_ai.response.id": decision.id,
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "router.request_id": logs.REQUEST_ID.get(),
            "router.policy_version": decision.policy_version,
            "router.fallback": fallback,
            "router.forced": forced,
            "router.status": outcome.status,
        }
        if outcome.finish_reason:
            attributes["gen_ai.response.finish_reasons"] = [outcome.finish_reason]
        if outcome.ttft_s > 0:
            attributes["gen_ai.response.time_to_first_chunk"] = outcome.ttft_s
        span = self._tracer.start_span(
            f"{operation} {decision.arm}",
            context=PARENT.get(),
            kind=self._client,
            attributes=attributes,
            start_time=end_ns - round(1e9 * outcome.latency_s),
        )
        if outcome.status in ("error", "rejected"):
            span.set_attribute("error.type", outcome.status)
            span.set_status(self._error, outcome.status)
        span.end(end_ns)
