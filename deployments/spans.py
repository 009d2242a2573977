"""OpenTelemetry spans, one for each answer of a model, named as the GenAI conventions have it.

Off unless the standard variables say where to send them (OTEL_EXPORTER_OTLP_ENDPOINT, or ..._TRACES_ENDPOINT). No word
of a prompt or an answer is in them. A client's `traceparent` makes its trace the parent. Sending happens in a thread
of its own, from a bounded queue: a collector that is away costs spans, and nothing else.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from deployments import logs
from policies.types import FORCED, Decision, Outcome

WHERE = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
OPERATIONS = {"chat": "chat", "completion": "text_completion", "embed": "embeddings"}
PARENT: ContextVar[Any] = ContextVar("parent", default=None)


class Spans:
    """Of one ingress replica; imports the SDK when it is made, and not before."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "adaptive-llm-router")
        self.provider = TracerProvider(resource=Resource.create({"service.name": name}))  # Ray has the global one
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer, self._propagator = self.provider.get_tracer(__name__), TraceContextTextMapPropagator()
        self._client, self._error = SpanKind.CLIENT, StatusCode.ERROR

    @classmethod
    def wanted(cls) -> "Spans | None":
        """None, which costs nothing, unless there is somewhere to send them."""
        return cls() if any(os.environ.get(name) for name in WHERE) else None

    def arrived(self, headers: Mapping[str, str]) -> None:
        """A request came in; what its client traces becomes the parent of what follows in this context."""
        PARENT.set(self._propagator.extract(headers))

    def finished(self, decision: Decision, outcome: Outcome) -> None:
        """A model's answer ended, or it did not give one."""
        operation, end_ns = OPERATIONS[decision.profile.task], time.time_ns()
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": decision.arm,
            "gen_ai.response.model": decision.arm,
            "gen_ai.response.id": decision.id,
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "router.request_id": logs.REQUEST_ID.get(),
            "router.policy_version": decision.policy_version,
            "router.fallback": "none" if decision.fallback in ("", FORCED) else decision.fallback,
            "router.forced": decision.fallback == FORCED,
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
