"""Seeded mutations of valid requests of every route: hostile values, structures, bytes and headers."""

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.hostile_input import ASK, JSON, nested, tool

CHAT = "/v1/chat/completions"
OPERATE = "/v1/router"
DECISION = "dec-019aa0000000000000000000000000000000"


@dataclass
class Sent:
    """One request.

    body: a JSON value before the mutation; None for no body. raw: its bytes.
    """

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    raw: bytes = b""


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]{1,9}$", "minLength": 1},
        "b": {"$ref": "#/$defs/b"},
        "c": {"enum": ["x", 1, None]},
    },
    "$defs": {"b": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
}
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElF"
    "TkSuQmCC"
)
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
VALID: list[tuple[str, str, Any]] = [
    ("POST", CHAT, ASK),
    ("POST", CHAT, {**ASK, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", CHAT, {**ASK, "response_format": FORMAT}),
    (
        "POST",
        CHAT,
        {
            **ASK,
            "tools": [tool({"type": "string"}), tool(SCHEMA)],
            "tool_choice": "required",
        },
    ),
    (
        "POST",
        CHAT,
        {
            **ASK,
            "model": "auto:fast",
            "stop": ["a", "b"],
            "logit_bias": {"5": 1.5, "7": -1},
            "metadata": {"a": "b"},
            "user": "me",
            "seed": 5,
            "n": 2,
            "temperature": 0.5,
            "top_p": 0.5,
            "max_completion_tokens": 9,
            "logprobs": True,
            "top_logprobs": 3,
            "prediction": {"type": "content", "content": "a"},
            "router": {"max_cost": 1.0, "models": ["small"], "priority": "high"},
        },
    ),
    (
        "POST",
        CHAT,
        {
            "model": "large",
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "c"},
            ],
        },
    ),
    (
        "POST",
        CHAT,
        {
            **ASK,
            "model": "small",
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "max_tokens": 9,
            "ignore_eos": True,
            "stop_token_ids": [5, 7],
            "allowed_token_ids": [5, 6, 7],
            "bad_words": ["a"],
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "include_stop_str_in_output": True,
            "truncate_prompt_tokens": 9,
            "truncation_side": "left",
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "add_generation_prompt": True,
            "include_reasoning": False,
            "reasoning_effort": "none",
            "chat_template_kwargs": {"enable_thinking": False, "a": [1, "b"]},
            "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
            "cache_salt": "a",
        },
    ),
    (
        "POST",
        CHAT,
        {
            "model": "auto",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "b"},
                        {"type": "image_url", "image_url": {"url": IMAGE}},
                    ],
                }
            ],
        },
    ),
    ("POST", CHAT, {**ASK, "structured_outputs": {"json": SCHEMA}}),
    ("POST", CHAT, {**ASK, "structured_outputs": {"json": json.dumps(SCHEMA)}}),
    ("POST", CHAT, {**ASK, "structured_outputs": {"regex": "^(a|b){1,9}[0-9]+$"}}),
    ("POST", CHAT, {**ASK, "structured_outputs": {"choice": ["yes", "no"]}}),
    (
        "POST",
        CHAT,
        {
            **ASK,
            "structured_outputs": {"json_object": True},
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "stream_interval": 2,
        },
    ),
    (
        "POST",
        "/v1/completions",
        {"model": "auto", "prompt": "3 plus 5 is", "echo": True, "logprobs": 1},
    ),
    (
        "POST",
        "/v1/completions",
        {
            "model": "small",
            "prompt": [[1, 2], [3]],
            "response_format": FORMAT,
            "logprobs": 1,
            "logprob_token_ids": [1, 2],
            "truncate_prompt_tokens": -1,
        },
    ),
    ("POST", "/v1/completions", {"model": "small", "prompt": "a", "stream": True}),
    (
        "POST",
        "/v1/embeddings",
        {"model": "auto", "input": ["a", "b"], "encoding_format": "base64"},
    ),
    ("POST", "/v1/embeddings", {"model": "minilm", "input": "QUJD", "dimensions": 8}),
    ("POST", "/v1/feedback", {"decision_id": DECISION, "score": 0.5, "source": "a"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/small", None),
    ("GET", f"{OPERATE}/decisions/{DECISION}", None),
    ("GET", f"{OPERATE}/state", None),
    ("GET", f"{OPERATE}/versions/1/diff?other=2", None),
    ("POST", f"{OPERATE}/versions", {"policy": "thompson", "options": {"a": 1.0}}),
    ("POST", f"{OPERATE}/versions/1/evaluate", None),
    ("POST", f"{OPERATE}/versions/1/promote", {"to": "shadow", "share": 0.1}),
    (
        "POST",
        f"{OPERATE}/versions/rollback",
        {"role": "shadow", "reason": "a reason"},
    ),
    ("POST", f"{OPERATE}/rollout/advance", {"override_gate": ""}),
    (
        "POST",
        f"{OPERATE}/calibrations",
        {
            "prompts": [
                {"prompt": "a", "reference": "^(a|b){2}$", "grade": "regex"},
                {"messages": [{"role": "user", "content": "b"}], "reference": [1]},
                {"prompt": "c", "reference": "4", "grade": "number", "max_tokens": 5},
            ],
            "models": ["small"],
            "max_calls": 5,
            "max_usd": 0.1,
        },
    ),
    ("DELETE", f"{OPERATE}/calibrations", None),
    (
        "POST",
        f"{OPERATE}/calibrations/scores",
        {"scores": [{"decision_id": DECISION, "score": 1.0}]},
    ),
    ("GET", "/healthz", None),
    ("GET", "/readyz?models=all", None),
    ("GET", "/openapi.json", None),
]
# texts in place of any value; what is longer than a few kB is rare, see `hostile_value`
TEXTS = [
    "",
    " ",
    "\x00",
    "\u202e",
    "\ufeff",
    "\ufdfa" * 50,
    "a" + "\u0301" * 200,
    "\U0001f468\u200d\U0001f469",
    "İ" * 50,
    "ß" * 50,
    "../../etc/passwd",
    "{{ 1 }}",
    "%00%ff",
    "null",
    "NaN",
    "-0",
    "9" * 400,
    "a" * 257,
    "\n" * 100,
    "QUJD" * 100,
    "dec-",
    "auto:",
    "(" * 30 + ")" * 30,
    "^((a?){1,128}){1,128}$",
    "(a|aa)+$",
    "{" + " " * 300,
    "[" * 300,
    "(?!a)b\n",
    "a{999999999999}",
    "#/$defs/a",
    "http://127.0.0.1/",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    True,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    10**400,
    10**4_200,
    0.1,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
# what JSON has and Python's values have not
RAW = [b"1e999", b"-1e999", b"9" * 5_000, b"0." + b"1" * 5_000, b"1E400", b'"\\ud800"']
PLACE = "\ue000place\ue000"
KEYS = ["pattern", "$ref", "enum", "anyOf", "maxProperties", "minLength", "strict"]


def hostile_value(rng: random.Random) -> Any:
    """A value that no valid request has here."""
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind == 5:
        return PLACE
    if kind == 6:
        return nested(rng.choice([1, 5, 15, 16, 17, 100, 199, 250]))
    if kind == 7:
        return [rng.choice(TEXTS) for _ in range(rng.choice([0, 1, 5, 300]))]
    if kind == 8:
        count = rng.choice([1, 17, 301, 2_000])
        return {f"{rng.choice(KEYS)}{i}": i for i in range(count)}
    if kind == 9:
        return {
            rng.choice(KEYS): rng.choice(
                [rng.choice(TEXTS), rng.choice(NUMBERS), copy.deepcopy(SCHEMA)]
            )
            for _ in range(3)
        }
    if kind == 10 and rng.random() < 0.15:
        return rng.choice(["x", "\u4e2d", "1 ", "a\u0301"]) * rng.choice(
            [5_000, 100_000]
        )
    if kind == 11:
        width = rng.choice([2, 30])
        names = range(rng.choice([3, 30]))
        parts = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in names}
        return {"$ref": "#/$defs/a0", "$defs": parts, "enum": list(range(width))}
    return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change_tree(rng: random.Random, body: Any) -> Any:
    """Change one place of a JSON value."""
    places = list(_places(body))
    if not places or rng.random() < 0.03:
        return hostile_value(rng)
    container, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        name = rng.choice([rng.choice(TEXTS), rng.choice(KEYS), "k" * 2_000])
        container[name] = hostile_value(rng)
    elif kind == 2:
        container[key] = [container[key]] * rng.choice([1, 5, 65, 2_049])
    elif kind == 3:
        container[key] = {"a": container[key]}
    else:
        container[key] = hostile_value(rng)
    return body


def _encode(rng: random.Random, body: Any) -> bytes:
    """JSON, with some member twice or a number that Python cannot hold."""
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    raw = raw.replace(json.dumps(PLACE).encode(), rng.choice(RAW))
    raw = raw.replace(f'"{PLACE}"'.encode(), rng.choice(RAW))
    if rng.random() < 0.05 and raw.startswith(b"{") and len(raw) > 2:
        raw = raw[:-1] + b"," + raw[1:]
    return raw


def _change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut, flip, insert, compress or encode otherwise."""
    kind = rng.randrange(7)
    at = rng.randrange(len(raw) + 1)
    if kind == 0:
        return raw[:at]
    if kind == 1 and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]
    if kind == 3:
        return gzip.compress(raw, mtime=0)
    if kind == 4:
        return raw.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32"]))
    if kind == 5:
        return b"\xef\xbb\xbf" + raw
    return raw + raw


HEADERS: list[dict[str, str]] = [
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-7"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=a"},
    {"content-encoding": "gzip"},
    {"idempotency-key": "a"},
    {"idempotency-key": "k" * 300},
    {"x-request-id": "a" * 5_000},
    {"authorization": "Bearer rk-1-2"},
    {"accept": "text/event-stream"},
    {"traceparent": "00-zz"},
]
SEGMENTS = ["..", "%00", "%2f", "-1", "0", "1e9", "9" * 30, "a" * 300, "%ff", "é", "*"]


def _change_path(rng: random.Random, path: str) -> str:
    """Change a part of the path or of the query."""
    head, question, query = path.partition("?")
    if question and rng.random() < 0.5:
        return f"{head}?{query.partition('=')[0]}={rng.choice(SEGMENTS)}"
    parts = head.split("/")
    at = rng.randrange(1, len(parts))
    parts[at] = rng.choice([*SEGMENTS, parts[at] + "/", parts[at].upper()])
    return "/".join(parts) + question + query


def mutated(rng: random.Random) -> Sent:
    """A valid request with one to three changes."""
    method, path, body = rng.choice(VALID)
    sent = Sent(method, path, copy.deepcopy(body))
    changes: list[Callable[[], None]] = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        if sent.body is not None and rng.random() < 0.8:
            sent.body = _change_tree(rng, sent.body)
        else:
            changes.append(lambda: _change_rest(rng, sent))
    if body is not None:
        sent.raw = _encode(rng, sent.body)
    for change in changes:
        change()
    return sent


def _change_rest(rng: random.Random, sent: Sent) -> None:
    kind = rng.randrange(8)
    if kind < 4:
        sent.raw = _change_bytes(rng, sent.raw)
    elif kind < 6:
        sent.headers |= rng.choice(HEADERS)
    elif kind == 6:
        sent.path = _change_path(rng, sent.path)
    else:
        sent.method = rng.choice(["GET", "POST", "DELETE", "PUT", "PATCH"])
