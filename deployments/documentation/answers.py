"""Schemas of answers and errors for the documentation, as JSON schemas; nothing is validated with them."""

from collections.abc import Iterable, Mapping
from typing import Any

Schema = dict[str, Any]


def _object(
    description: str, required: Iterable[str] = (), **properties: Schema
) -> Schema:
    """An object that may have more than these properties."""
    return {
        "type": "object",
        "description": description,
        "required": list(required),
        "properties": properties,
        "additionalProperties": True,
    }


def _of(kind: str, description: str, **more: Any) -> Schema:
    return {"type": kind, "description": description, **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str, description: str) -> Schema:
    return {"type": "array", "items": _ref(name), "description": description}


TEXT: Schema = {"type": "string"}
NULLABLE: Schema = {"anyOf": [{"type": "string"}, {"type": "null"}]}
USAGE = _object(
    "Token counts.",
    prompt_tokens=_of("integer", "Tokens of the prompt."),
    completion_tokens=_of("integer", "Tokens of the answer."),
    total_tokens=_of("integer", "Their sum."),
)
STOP = {"description": "Why the answer ended: stop, length or tool_calls.", **NULLABLE}
SCHEMAS: Mapping[str, Schema] = {
    "Error": _object(
        "An error in OpenAI's shape.",
        ["error"],
        error=_object(
            "What is wrong, and what to change.",
            ["message", "type", "param", "code"],
            message=_of("string", "In words."),
            type=_of(
                "string",
                "The class of error.",
                enum=[
                    "invalid_request_error",
                    "authentication_error",
                    "permission_error",
                    "not_found_error",
                    "rate_limit_error",
                    "server_error",
                ],
            ),
            param={
                "description": "Path of the wrong value in the body.",
                **NULLABLE,
            },
            code={"description": "A name for programs.", **NULLABLE},
        ),
    ),
    "Usage": USAGE,
    "ChatCompletion": _object(
        "An answer, as OpenAI's API has it.",
        ["choices"],
        id=_of("string", "Of this answer."),
        object=_of("string", "chat.completion"),
        created=_of("integer", "Seconds since the epoch."),
        model=_of("string", "The model that answered."),
        choices={
            "type": "array",
            "items": _object(
                "One of `n` answers.",
                message=_object(
                    "What the model says.",
                    role=_of("string", "assistant"),
                    content={"description": "The text.", **NULLABLE},
                    reasoning={
                        "description": "What the model thought before it answered.",
                        **NULLABLE,
                    },
                    reasoning_content={
                        "description": "The same, for clients that read this name.",
                        **NULLABLE,
                    },
                    tool_calls={
                        "description": "The functions that the model calls.",
                        "type": ["array", "null"],
                        "items": {"type": "object"},
                    },
                ),
                index=_of("integer", "From 0."),
                finish_reason=STOP,
            ),
        },
        usage=_ref("Usage"),
    ),
    "Completion": _object(
        "The continuations of the prompts, as OpenAI's API has them.",
        ["choices"],
        model=_of("string", "The model that answered."),
        choices={
            "type": "array",
            "items": _object(
                "A continuation.",
                text=_of("string", "Without the prompt."),
                index=_of("integer", "From 0, in the order of the prompts."),
                finish_reason=STOP,
            ),
        },
        usage=_ref("Usage"),
    ),
    "Embeddings": _object(
        "One vector for each text, in their order.",
        data={
            "type": "array",
            "items": _object(
                "The vector of one text.",
                index=_of("integer", "From 0."),
                embedding={
                    "description": "Numbers, or base64 of 32-bit floats.",
                    "anyOf": [
                        {"type": "array", "items": {"type": "number"}},
                        TEXT,
                    ],
                },
            ),
        },
        model=_of("string", "The model that answered."),
        usage=_ref("Usage"),
    ),
    "Model": _object(
        "A name that requests may have as `model`.",
        ["id", "object"],
        id=_of("string", "auto, auto:PRESET or the name of a model or a variant."),
        object=_of("string", "model"),
        created=_of("integer", "Seconds since the epoch."),
        owned_by=_of("string", "router, or models."),
        parent=_of("string", "Of a variant: its model."),
    ),
    "ModelList": _object(
        "All names that requests may have as `model`.",
        ["object", "data"],
        object=_of("string", "list"),
        data=_list("Model", "auto and its presets first."),
    ),
    "FeedbackReply": _object(
        "What happened to the score.",
        ["decision_id", "status"],
        decision_id=TEXT,
        status=_of(
            "string",
            "accepted; duplicate or repeated, the same score was there; pending, it counts when the decision arrives.",
            enum=["accepted", "duplicate", "repeated", "pending"],
        ),
    ),
    "ArmWorth": _object(
        "One model at the decision: worth = quality - time - money - scarcity, in score points. Unknown is null.",
        arm=_of("string", "Name of the model."),
        removed_by=_of("string", "The limit that excluded it; empty for none."),
        propensity=_of("number", "Probability with which it is chosen, in [0, 1]."),
        worth={"description": "Score points.", "type": ["number", "null"]},
        quality={
            "description": "Expected score, in [0, 1].",
            "type": ["number", "null"],
        },
        time={
            "description": "Expected seconds times latency_weight.",
            "type": ["number", "null"],
        },
        money={
            "description": "Expected US dollars times cost_weight.",
            "type": ["number", "null"],
        },
        scarcity={
            "description": "What the request pays for its place at a model that has too many requests.",
            "type": ["number", "null"],
        },
        drawn={
            "description": "One sample of the worth (Thompson sampling).",
            "type": ["number", "null"],
        },
        scored_answers={
            "description": "Scored answers of this model and kind in the window.",
            "type": ["integer", "null"],
        },
        latency_s={"description": "Seconds.", "type": ["number", "null"]},
        cost_usd={"description": "US dollars.", "type": ["number", "null"]},
        load=_of("number", "Requests in flight a replica."),
    ),
    "Explanation": _object(
        "Why a model was chosen, and what came of it.",
        ["decision_id", "model", "summary", "models"],
        decision_id=TEXT,
        model=_of("string", "The chosen model."),
        time=_of("string", "Of the decision, ISO 8601.", format="date-time"),
        time_s=_of("number", "The same in seconds since the epoch."),
        story={
            "type": "array",
            "items": TEXT,
            "description": "At most ten lines: what was seen, who was eligible, what each was worth, what came.",
        },
        summary=_of("string", "The story as one text."),
        models=_list("ArmWorth", "All models."),
        feedback={"type": "array", "items": {"type": "object"}},
    ),
    "Health": _object("The gateway runs.", status=_of("string", "ok")),
}

ANSWERS: Mapping[tuple[str, str], tuple[str, str]] = {  # schema and description
    ("post", "/v1/chat/completions"): ("ChatCompletion", "The answer, or a stream."),
    ("post", "/v1/completions"): ("Completion", "The answer, or a stream."),
    ("post", "/v1/embeddings"): ("Embeddings", "The vectors."),
    ("get", "/v1/models"): ("ModelList", "The models."),
    ("get", "/v1/models/{model}"): ("Model", "The model."),
    ("post", "/v1/feedback"): ("FeedbackReply", "The score counts."),
    ("get", "/v1/router/decisions/{decision_id}"): ("Explanation", "The story."),
    ("get", "/healthz"): ("Health", "The process runs."),
}
STREAMED = ("/v1/chat/completions", "/v1/completions")
ANSWER_HEADERS: Mapping[str, str] = {
    "x-router-decision-id": "Id of the decision, for feedback and for the explanation.",
    "x-router-model": "The model that answered, or its variant.",
    "x-router-policy-version": "The policy version that decided.",
    "x-router-fallback": "none; profiler, router or model if that component did not answer; hedge if a second model "
    "answered first.",
    "x-request-id": "The client's, or a new one.",
}

ERRORS: Mapping[int, str] = {
    400: "A wrong value; `param` says which, and `message` what to change. Also: no model can keep the limits.",
    401: "No API key, or none that is valid. Only where the gateway has keys.",
    403: "The API key has no scope for this. Without keys: another host or another site's page asks.",
    404: "Unknown model, decision or version.",
    408: "The body did not arrive within 10 s.",
    409: "Not possible as things are; `message` says why and what would change it.",
    410: "The decision is too old for feedback.",
    413: "The body is larger than `max_body_bytes`.",
    422: "The Idempotency-Key was used with another body.",
    429: "Too many requests of this key, or all models are busy; try again after `retry-after` seconds.",
    503: "No model, router or registry is available; try again after `retry-after` seconds.",
}
OF_KEYS = (401, 403, 429)  # where a route needs a key
OF_BODIES = (400, 408, 413, 503)  # where a route has a body
OWN_ERRORS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("post", "/v1/chat/completions"): (404,),
    ("post", "/v1/completions"): (404,),
    ("post", "/v1/embeddings"): (404,),
    ("get", "/v1/models/{model}"): (404,),
    ("post", "/v1/feedback"): (404, 409, 410, 422),
    ("get", "/v1/router/decisions/{decision_id}"): (404, 503),
    ("get", "/v1/router/state"): (503,),
    ("get", "/v1/router/rollout"): (503,),
    ("get", "/readyz"): (503,),
}
