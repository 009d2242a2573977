"""Bodies and parameters that run as they stand against the default models: four that chat, minilm, and auto."""

from collections.abc import Mapping
from typing import Any

# start.js puts the decision of the page's last answer in its place
LAST_DECISION = "id-of-the-last-answer"
QUESTION = [{"role": "user", "content": "What is 347 plus 586?"}]
Examples = Mapping[str, Mapping[str, Any]]


def _example(summary: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "value": dict(value)}


CHAT: Examples = {
    "auto": _example(
        "The router chooses the model", {"model": "auto", "messages": QUESTION}
    ),
    "named": _example(
        "A model by name, without a choice",
        {"model": "nano", "messages": QUESTION, "max_tokens": 40},
    ),
    "options": _example(
        "Options of the router for this request",
        {
            "model": "auto",
            "messages": QUESTION,
            "router": {
                "latency_weight": 0.1,
                "cost_weight": 500,
                "models": ["small", "large"],
                "priority": "normal",
            },
        },
    ),
    "stream": _example(
        "A stream, with the token counts in its last chunk",
        {
            "model": "auto",
            "messages": QUESTION,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "seed": _example(
        "The same answer each time",
        {
            "model": "large",
            "messages": QUESTION,
            "temperature": 0,
            "seed": 7,
            "max_completion_tokens": 60,
        },
    ),
    "vllm": _example(
        "Parameters of vLLM's",
        {
            "model": "auto",
            "messages": QUESTION,
            "max_tokens": 40,
            "min_tokens": 2,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.05,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    "choice": _example(
        "One of several answers",
        {
            "model": "auto",
            "messages": QUESTION,
            "structured_outputs": {"choice": ["833", "933", "1033"]},
        },
    ),
    "regex": _example(
        "An answer of a form, as a stream with the token counts in each chunk",
        {
            "model": "large",
            "messages": QUESTION,
            "max_tokens": 8,
            "structured_outputs": {"regex": "[0-9]{1,5}"},
            "stream": True,
            "stream_options": {
                "include_usage": True,
                "continuous_usage_stats": True,
            },
        },
    ),
}
COMPLETION: Examples = {
    "auto": _example(
        "The router chooses the model",
        {"model": "auto", "prompt": "What is 12 plus 30?", "max_tokens": 40},
    ),
    "several": _example(
        "Two prompts in one request",
        {
            "model": "small",
            "prompt": ["What is 2 plus 2?", "Reverse the word planet."],
            "max_tokens": 40,
        },
    ),
    "tokens": _example(
        "Token ids, and the probabilities of the prompt's tokens",
        {
            "model": "small",
            "prompt": [40, 41, 42],
            "max_tokens": 5,
            "prompt_logprobs": 2,
            "return_token_ids": True,
            "stop_token_ids": [7],
        },
    ),
}
EMBEDDING: Examples = {
    "auto": _example(
        "The model of all embeddings", {"model": "auto", "input": "a short text"}
    ),
    "several": _example(
        "Two texts, and the model by name",
        {"model": "minilm", "input": ["a short text", "another text"]},
    ),
}
FEEDBACK: Examples = {
    "right": _example(
        "The last answer of this page was right",
        {"decision_id": LAST_DECISION, "score": 1.0, "source": "user"},
    ),
    "wrong": _example(
        "The last answer of this page was wrong",
        {"decision_id": LAST_DECISION, "score": 0.0, "source": "user"},
    ),
}
CALIBRATION: Examples = {
    "small": _example(
        "Two prompts, of which a number is the right answer",
        {
            "prompts": [
                {
                    "prompt": "What is 2 plus 2?",
                    "reference": "4",
                    "grade": "number",
                    "max_tokens": 60,
                },
                {
                    "prompt": "What is 12 plus 30?",
                    "reference": "42",
                    "grade": "number",
                    "max_tokens": 60,
                },
            ],
            "max_calls": 6,
        },
    )
}
SCORES: Examples = {
    "one": _example(
        "A score for one answer; an answer that waits for no score is ignored",
        {"scores": [{"decision_id": LAST_DECISION, "score": 1.0}]},
    )
}
PUBLISH: Examples = {
    "champion": _example("What the champion has learned by now", {}),
    "other": _example(
        "Another policy, which learns from the whole journal first",
        {"policy": "thompson", "options": {"least_propensity": 0.01}},
    ),
}
PROMOTE: Examples = {
    "shadow": _example("Decides beside the champion, without effect", {"to": "shadow"}),
    "challenger": _example(
        "Gets 10 % of the traffic", {"to": "challenger", "share": 0.1}
    ),
    "champion": _example("Gets all traffic, if the gate agrees", {"to": "champion"}),
}
ROLLBACK: Examples = {
    "champion": _example(
        "Back to the predecessor",
        {"role": "champion", "reason": "the answers got worse"},
    )
}
RESTORE: Examples = {
    "key": _example(
        "As if the scores of one key since this time had never arrived",
        {"forget_since": "2026-11-01T10:00Z", "key": "crawler", "reason": "bad scores"},
    )
}
PERSON: Examples = {
    "user": _example("A client's user", {"user": "zoe@example.com"}),
    "key": _example("An API key", {"key": "crawler"}),
}
ADVANCE: Examples = {"gate": _example("If the gate agrees", {})}

BODIES: Mapping[tuple[str, str], Examples] = {
    ("post", "/v1/chat/completions"): CHAT,
    ("post", "/v1/completions"): COMPLETION,
    ("post", "/v1/embeddings"): EMBEDDING,
    ("post", "/v1/feedback"): FEEDBACK,
    ("post", "/v1/router/calibrations"): CALIBRATION,
    ("post", "/v1/router/calibrations/scores"): SCORES,
    ("post", "/v1/router/versions"): PUBLISH,
    ("post", "/v1/router/versions/{version}/promote"): PROMOTE,
    ("post", "/v1/router/versions/rollback"): ROLLBACK,
    ("post", "/v1/router/versions/{version}/restore"): RESTORE,
    ("post", "/v1/router/rollout/advance"): ADVANCE,
    ("post", "/v1/router/erasures"): PERSON,
    ("post", "/v1/router/exports"): PERSON,
}
PARAMETERS: Mapping[str, Any] = {  # by name
    "decision_id": LAST_DECISION,
    "model": "small",
    "version": 1,
    "erasure_id": "id-of-an-erasure",
}
