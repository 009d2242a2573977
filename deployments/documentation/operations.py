"""The words of the API's description: what it is, its groups, and one line for each route."""

from collections.abc import Mapping

DESCRIPTION = """\
One OpenAI-compatible URL in front of the models of several sizes. Send `model: auto`, and the router chooses the size
that serves the request best; send the name of a model to ask that one.

1. **Ask**: `POST /v1/chat/completions`. The answer's header `x-router-decision-id` names the decision.
2. **Score**: `POST /v1/feedback` with that id, and the router learns from it.
3. **Understand**: `GET /v1/router/decisions/{decision_id}` says why this model was chosen.

On this page the examples run as they stand. The text `id-of-the-last-answer` stands for the decision of the last answer
that this page has received. With **Authorize** the page sends your API key, which stays in this tab; a gateway without
keys needs none.

Errors have OpenAI's shape, and `message` says what to change. Times are in seconds, prices and costs in US dollars, and
scores in [0, 1].
"""
KEY = "An API key of this gateway: `rk-…`. Needed only where the gateway has keys."

TAGS: Mapping[str, str] = {
    "OpenAI": "As at OpenAI; any client of its API works. Needs the scope `infer`.",
    "feedback": "Scores of answers, from which the router learns. Needs the scope `feedback`.",
    "router": "Why decisions were made, and how the models do. The state needs the scope `operate`.",
    "versions": "Policy versions and their roles, and the stages of the first day. Needs the scope `operate`.",
    "calibrations": "Every size answers your own prompts while it is idle. Needs the scope `operate`.",
    "health": "For load balancers; open without a key.",
}
# the group of a route is that of the longest prefix of its path
GROUPS: Mapping[str, str] = {
    "/v1/": "OpenAI",
    "/v1/feedback": "feedback",
    "/v1/router": "router",
    "/v1/router/versions": "versions",
    "/v1/router/rollout": "versions",
    "/v1/router/calibrations": "calibrations",
    "/": "health",
}
SUMMARIES: Mapping[tuple[str, str], str] = {
    ("post", "/v1/chat/completions"): "Answer a chat",
    ("post", "/v1/completions"): "Continue a prompt",
    ("post", "/v1/embeddings"): "Embed texts",
    ("get", "/v1/models"): "List the models",
    ("get", "/v1/models/{model}"): "Show a model",
    ("post", "/v1/feedback"): "Score an answer",
    ("get", "/v1/router/decisions/{decision_id}"): "Explain a decision",
    ("get", "/v1/router/state"): "Show what the router measures and knows",
    ("get", "/v1/router/versions"): "List the policy versions",
    ("post", "/v1/router/versions"): "Register what is learned as a new version",
    ("get", "/v1/router/versions/{version}"): "Show a version",
    ("get", "/v1/router/versions/{version}/diff"): "Compare two versions",
    ("post", "/v1/router/versions/{version}/evaluate"): "Evaluate a version on the log",
    ("post", "/v1/router/versions/{version}/promote"): "Give a version a role",
    ("post", "/v1/router/versions/rollback"): "Take a role away",
    ("get", "/v1/router/rollout"): "Show the roles and the stage of the first day",
    ("post", "/v1/router/rollout/advance"): "Begin the next stage of the first day",
    ("post", "/v1/router/calibrations"): "Start a calibration, or go on with it",
    ("get", "/v1/router/calibrations"): "Show the last calibration and its report",
    ("delete", "/v1/router/calibrations"): "Cancel the calibration that runs",
    (
        "get",
        "/v1/router/calibrations/answers",
    ): "List the answers that wait for a score",
    ("post", "/v1/router/calibrations/scores"): "Score answers of a calibration",
    ("get", "/healthz"): "Does the process run?",
    ("get", "/readyz"): "Is a model ready?",
}
DESCRIPTIONS: Mapping[tuple[str, str], str] = {
    (
        "post",
        "/v1/chat/completions",
    ): "With `model: auto` the router chooses among the sizes; `router` has its options.",
    (
        "post",
        "/v1/completions",
    ): "Each prompt gets `n` choices. Without `max_tokens` an answer has at most 16 tokens.",
    (
        "post",
        "/v1/embeddings",
    ): "`auto` always means the same model, because embeddings of different models cannot be "
    "compared.",
    (
        "get",
        "/v1/models",
    ): "`auto`, its presets (other objectives), and the models with their variants.",
    ("get", "/v1/models/{model}"): "As in the list.",
    ("get", "/v1/router/versions"): "With their roles, tags and metrics, from MLflow.",
    ("get", "/v1/router/versions/{version}"): "Its tags, metrics and evaluations.",
}


def group_of(path: str) -> str:
    """The group of a route."""
    fitting = [prefix for prefix in GROUPS if path.startswith(prefix)]
    return GROUPS[max(fitting, key=len)]
