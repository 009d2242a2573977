"""Bodies with very many errors: validation stops after the first few."""

import json
import tracemalloc
from typing import Any
from unittest import mock

import pytest
from fastapi.exceptions import RequestValidationError

from deployments.gateway.body_limits import (
    MAX_CONTAINERS,
    MAX_KEYS,
    MAX_MEMBERS,
    check_shape,
)
from tests.support.gateway import Gateway
from tests.support.hostile_input import JSON, openai_shape

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "x"}
MOST_ERRORS = MAX_KEYS + MAX_MEMBERS


def body(**change: Any) -> bytes:
    """Of a chat; at most a megabyte."""
    return json.dumps({"model": "auto", "messages": [MESSAGE], **change}).encode()


def many(item: str, closing: str, opening: str) -> bytes:
    """A megabyte of the same item in a list."""
    count = (1_000_000 - len(opening) - len(closing)) // (len(item) + 1)
    return (opening + ",".join([item] * count) + closing).encode()


def repeated(name: str, member: str) -> bytes:
    """A body with an object that has the same member over and over."""
    members = ",".join([member] * 100_000)
    return body()[:-1] + f',"{name}":{{{members}}}}}'.encode()


IN_MESSAGES = '{"model":"auto","messages":['
HOSTILE: dict[str, tuple[str, bytes]] = {
    "empty parts": (
        CHAT,
        many("{}", "]}]}", IN_MESSAGES + '{"role":"user","content":['),
    ),
    "numbers as messages": (CHAT, many("1", "]}", IN_MESSAGES)),
    "empty messages": (CHAT, many("{}", "]}", IN_MESSAGES)),
    "wrong biases": (CHAT, body(logit_bias={f"k{i}": "x" for i in range(60_000)})),
    "one bias 100,000 times": (CHAT, repeated("logit_bias", '"x":1')),
    "one wrong bias 100,000 times": (CHAT, repeated("logit_bias", '"1":"x"')),
    "one item of metadata 100,000 times": (CHAT, repeated("metadata", '"a":1')),
    "one unknown key 100,000 times": (CHAT, repeated("zz", '"a":1')),
    "unknown keys": (CHAT, body(**{f"k{i}": 1 for i in range(60_000)})),
    "unknown keys of a message": (
        CHAT,
        body(messages=[MESSAGE | {f"k{i}": 1 for i in range(60_000)}]),
    ),
    "5,000 unknown keys of a message": (
        CHAT,
        body(messages=[MESSAGE | {f"k{i}": 1 for i in range(4_998)}]),
    ),
    "metadata": (CHAT, body(metadata={f"k{i}": 1 for i in range(60_000)})),
    "stops": (CHAT, body(stop=[1] * 200_000)),
    "models": (CHAT, body(router={"models": [1] * 200_000})),
    "tools that are lists": (CHAT, body(tools=[[]] * 200_000)),
    "modalities": (CHAT, body(modalities=[1] * 200_000)),
    "lists in lists": (CHAT, b"[" * 100 + b"]" * 100),
    "token ids": (
        "/v1/completions",
        json.dumps({"model": "auto", "prompt": [1] * 200_000}).encode(),
    ),
    "texts that are numbers": (
        "/v1/embeddings",
        json.dumps({"model": "auto", "input": [1.5] * 200_000}).encode(),
    ),
    "unknown keys of a score": (
        "/v1/feedback",
        json.dumps({f"k{i}": 1 for i in range(60_000)}).encode(),
    ),
    "unknown keys of a promotion": (
        "/v1/router/versions/1/promote",
        json.dumps({f"k{i}": 1 for i in range(60_000)}).encode(),
    ),
    "options of a version": (
        "/v1/router/versions",
        json.dumps({"options": {f"k{i}": [] for i in range(60_000)}}).encode(),
    ),
}


@pytest.mark.parametrize(("path", "content"), HOSTILE.values(), ids=HOSTILE)
def test_a_body_that_is_wrong_everywhere_costs_little(
    gateway: Gateway, path: str, content: bytes
) -> None:
    """Validation reports few errors and takes little memory whatever the body's size, and the answer is short."""
    found: list[int] = []
    make = RequestValidationError.__init__

    def counting(self: Any, errors: Any, **options: Any) -> None:
        found.append(len(errors))
        make(self, errors, **options)

    with mock.patch.object(RequestValidationError, "__init__", counting):
        tracemalloc.start()
        answer = gateway.client.post(path, content=content, headers=JSON)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert answer.status_code == 400 and openai_shape(answer.json())
    assert len(answer.content) < 2_000
    assert peak < 40 * 2**20 + 8 * len(content)
    assert sum(found) <= MOST_ERRORS


@pytest.mark.parametrize("item", [b"{}", b"[]", b"[[]]", b'{"a":{}}'])
def test_containers_are_counted_before_validation(item: bytes) -> None:
    """The limit on objects and lists holds for every way to nest them, and refuses the first one above it."""
    inner = item.count(b"{") + item.count(b"[")
    allowed = (MAX_CONTAINERS - 1) // inner
    check_shape(b'{"a":[' + b",".join([item] * allowed) + b"]}")
    with pytest.raises(ValueError, match="objects and lists"):
        check_shape(b'{"a":[' + b",".join([item] * (allowed + inner)) + b"]}")


@pytest.mark.parametrize("raw", [b"null", b"1", b'"x"', b"[]", b"{}", b'{"a": NaN}'])
def test_any_small_json_passes(raw: bytes) -> None:
    """The check of the shape passes all small JSON; the validation after it judges the content."""
    check_shape(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": }', b"\xff", b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        check_shape(raw)


def test_an_error_names_the_first_wrong_item_of_a_list(gateway: Gateway) -> None:
    """The error gives the item's path in the client's body."""
    parts = [{"type": "text", "text": "a"}, {"type": "text"}, {}, {}]
    answer = gateway.client.post(
        CHAT, content=body(messages=[{"role": "user", "content": parts}]), headers=JSON
    )
    assert (
        answer.status_code == 400
        and answer.json()["error"]["param"] == "messages.0.content.1.text"
    )
