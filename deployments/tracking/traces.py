"""MLflow's traces of requests, made from the journal's records. They contain no text of prompts and answers.

A trace's id is derived from the id of its decision, so that a score finds its trace without a list of the sampled
decisions.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING

from deployments.journal.ids import trace_id
from policies.events import Decision, Outcome, Record
from policies.explain import explain
from policies.types import Arm

if TYPE_CHECKING:
    from mlflow.entities import Span, TraceInfo
    from opentelemetry.trace import SpanContext

PROVIDER = "ray-serve"  # who serves the models, for MLflow's view of costs
VERSION = "policy_version"


def span_id(decision_id: str, number: int) -> int:
    """Id of a decision's span with this number, derived from the decision's id."""
    return int.from_bytes(
        blake2b(f"{decision_id}/{number}".encode(), digest_size=8).digest()
    )


def trace_info(
    record: Record, experiment_id: str, run_id: str, arms: Mapping[str, Arm]
) -> "TraceInfo":
    """The trace of a finished decision, with tags by which a list of traces can be filtered.

    The state is ERROR only if the model failed. A request that was refused, and a client that left, are no errors of
    the model; the tag `status` says which they are.
    """
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    decision = record.decision
    outcome = record.outcome
    assert outcome is not None
    failed = outcome.status == "error"
    metadata = {
        "mlflow.sourceRun": run_id,
        "mlflow.trace.cost": json.dumps(costs(outcome, arms.get(decision.arm))),
        "mlflow.trace.tokenUsage": json.dumps(usage(outcome)),
    }
    if decision.owner:  # the name of the API key, which is no secret
        metadata["mlflow.trace.user"] = decision.owner
    return TraceInfo(
        trace_id=trace_id(decision.id),
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=int(decision.time_s * 1000),
        state=TraceState.ERROR if failed else TraceState.OK,
        request_preview=f"{decision.profile.kind}, {decision.profile.prompt_tokens} tokens",
        response_preview=f"{decision.arm}: {outcome.status}, {outcome.output_tokens} tokens",
        client_request_id=decision.id,
        execution_duration=int(outcome.latency_s * 1000),
        trace_metadata=metadata,
        tags={
            "mlflow.traceName": "request",
            "arm": decision.arm,
            "choice": choice(decision),
            "kind": decision.profile.kind,
            "status": outcome.status,
            VERSION: decision.policy_version,
        },
    )


def choice(decision: Decision) -> str:
    """Who chose the arm: "routed", or the name of the fallback (policies/events.py), as "forced"."""
    return decision.fallback or "routed"


def usage(outcome: Outcome) -> dict[str, int]:
    """Tokens of an answer, by MLflow's names."""
    tokens = {
        "input_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
    }
    return tokens | {"total_tokens": sum(tokens.values())}


def costs(outcome: Outcome, arm: Arm | None) -> dict[str, float]:
    """Cost of an answer in US dollars, by MLflow's names.

    The total is that of the journal. It is divided by the arm's prices of now; without an arm all of it is output.
    """
    prompt_usd = 0.0
    if arm is not None:
        prompt_usd = outcome.prompt_tokens * arm.prompt_price_usd
        output_usd = outcome.output_tokens * arm.output_price_usd
        whole_usd = prompt_usd + output_usd
        prompt_usd = outcome.cost_usd * prompt_usd / whole_usd if whole_usd else 0.0
    return {
        "input_cost": prompt_usd,
        "output_cost": outcome.cost_usd - prompt_usd,
        "total_cost": outcome.cost_usd,
    }


def spans_of(record: Record, arms: Mapping[str, Arm]) -> list["Span"]:
    """The spans of a request, of its decision and of its answer."""
    decision = record.decision
    outcome = record.outcome
    assert outcome is not None
    begin = int(decision.time_s * 1e9)
    first = begin + int(outcome.ttft_s * 1e9)
    end = begin + int(outcome.latency_s * 1e9)
    explanation = explain(record)
    explanation["outcome"].pop("answer")  # it may be the answer's text
    answer: dict[str, object] = {
        "finish_reason": outcome.finish_reason,
        "status": outcome.status,
        "flaw": outcome.flaw,
    }
    seconds = {
        "ttft_s": outcome.ttft_s,
        "latency_s": outcome.latency_s,
        "cost_usd": outcome.cost_usd,
    }
    of_model = {
        "mlflow.chat.tokenUsage": usage(outcome),
        "mlflow.llm.cost": costs(outcome, arms.get(decision.arm)),
        "mlflow.llm.model": decision.arm,
        "mlflow.llm.provider": PROVIDER,
    }
    kind = {"kind": decision.profile.kind}
    arm = {"arm": decision.arm}
    whole = (begin, end)
    spans = [
        _span(decision, 0, "request", "CHAIN", whole, explanation, answer | seconds),
        _span(decision, 1, "decide", "TASK", (begin, begin), kind, arm),
        _span(decision, 2, "answer", "LLM", whole, arm, answer, of_model),
    ]
    if first != begin:
        spans.append(_span(decision, 3, "first token", "TASK", (begin, first), {}, {}))
    return spans


def _span(
    decision: Decision,
    number: int,
    name: str,
    kind: str,
    times: tuple[int, int],
    inputs: Mapping[str, object],
    outputs: Mapping[str, object],
    more: Mapping[str, object] | None = None,
) -> "Span":
    """One span for MLflow. Times are nanoseconds since the epoch; the span with number 0 is the root."""
    from mlflow.entities.span import create_mlflow_span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(span_number: int) -> "SpanContext":
        trace = int(trace_id(decision.id).removeprefix("tr-"), 16)
        return SpanContext(
            trace, span_id(decision.id, span_number), False, TraceFlags(1)
        )

    attributes: dict[str, object] = {
        "mlflow.traceRequestId": trace_id(decision.id),
        "mlflow.spanType": kind,
        "mlflow.spanInputs": inputs,
        "mlflow.spanOutputs": outputs,
        **(more or {}),
    }
    span = ReadableSpan(
        name=name,
        context=context(number),
        parent=context(0) if number else None,
        resource=Resource.get_empty(),
        attributes={key: json.dumps(value) for key, value in attributes.items()},
        start_time=times[0],
        end_time=times[1],
        status=Status(StatusCode.OK),
    )
    return create_mlflow_span(span, trace_id(decision.id), kind)
