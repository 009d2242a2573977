"""Feedback over HTTP: late, early and repeated scores, idempotency keys, and what the journal keeps of a request."""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.journal.ids import LOCAL_SUFFIX, IdFactory, original_id, sampled
from deployments.models.report import ModelReport
from tests.support.gateway import Gateway, eventually


def send(
    gateway: Gateway, decision_id: str, score: float = 1.0, key: str | None = None
) -> Any:
    headers = {} if key is None else {"idempotency-key": key}
    return gateway.client.post(
        "/v1/feedback",
        json={"decision_id": decision_id, "score": score},
        headers=headers,
    )


def quality_events(gateway: Gateway) -> float:
    return float(gateway.router.thing._policy.state()["quality.count"].sum())


def test_feedback_is_410_for_an_expired_and_404_for_an_unknown_decision(
    gateway: Gateway,
) -> None:
    """The checksum in an id distinguishes an old decision from an invented one."""
    identity = IdFactory(gateway.router.thing._journal.salt)
    old = identity.new_id(time.time() - 31 * 86_400)
    answer = send(gateway, old)
    assert (
        answer.status_code == 410
        and answer.json()["error"]["code"] == "feedback_expired"
    )
    forged = IdFactory(b"x" * 32).new_id(time.time() - 31 * 86_400)
    for unknown in (forged, old[:-1], old + "0", "dec-", "dec-" + "z" * 36, "dec-é"):
        assert send(gateway, unknown).status_code == 404, unknown
    # a decision of an hour ago would have reached the router
    overdue = identity.new_id(time.time() - 3600)
    assert send(gateway, overdue).status_code == 404


def test_scores_count_in_the_chance_of_a_score(gateway: Gateway) -> None:
    """Without keys, too: exploration is as wide as every second answer is scored."""
    for n in range(60):
        decision_id = gateway.chat().headers["x-router-decision-id"]
        if n % 2:
            send(gateway, decision_id)
    client = gateway.ingress.router_client
    eventually(lambda: 0.5 < client.scoring_rate("") < 0.7)


@pytest.mark.parametrize("source", ["check", "implicit"])
def test_a_source_whose_scores_would_not_count_is_refused(
    gateway: Gateway, source: str
) -> None:
    """The journals of earlier releases have derived scores of these names."""
    body = {"decision_id": "dec-1", "score": 1.0, "source": source}
    answer = gateway.client.post("/v1/feedback", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "source" and "choose another name" in error["message"]


def test_an_id_has_one_spelling(gateway: Gateway) -> None:
    """Another spelling of a valid id was held for ever, with a row of the journal for each."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    identity = gateway.ingress.router_client.identity
    local = identity.local_id(decision_id)
    spellings = [
        decision_id.removeprefix("dec-"),
        f"{decision_id}{LOCAL_SUFFIX}",
        f"{decision_id}{LOCAL_SUFFIX}00000000",
        f"{local}0",
        f"{local}{LOCAL_SUFFIX}",
        local.removeprefix("dec-"),
        decision_id.upper(),
        f"dec-{decision_id}",
    ]
    before = gateway.router.thing._journal.last_row
    for spelling in spellings:
        assert identity.created_at(spelling) is None
        assert send(gateway, spelling).status_code == 404, spelling
        answer = gateway.client.get(f"/v1/router/decisions/{spelling}")
        assert answer.status_code == 404, spelling
    assert gateway.router.thing._journal.last_row == before
    assert identity.created_at(local) == identity.created_at(decision_id) is not None
    assert original_id(local) == original_id(decision_id) == decision_id
    assert all(sampled(local, s) == sampled(decision_id, s) for s in (0.1, 0.5, 0.9))
    assert len(local) <= 64 and send(gateway, local).status_code == 202


def test_feedback_that_arrives_before_its_decision_counts_later(
    gateway: Gateway,
) -> None:
    """The router was down: the ingress decided locally, and its report arrives after the client's score."""
    gateway.router.broken = True
    decision_id = gateway.chat().headers["x-router-decision-id"]
    assert LOCAL_SUFFIX in decision_id
    gateway.router.broken = False
    assert [send(gateway, decision_id, score).status_code for score in (1.0, 0.0)] == [
        202,
        202,
    ]
    where = f"/v1/router/decisions/{decision_id}"
    eventually(lambda: gateway.client.get(where).status_code == 200)
    assert gateway.client.get(where).json()["feedback"] == [
        {"source": "user", "score": 0.0}
    ]
    assert quality_events(gateway) == pytest.approx(1)


def test_a_key_has_one_effect_and_one_reply(gateway: Gateway) -> None:
    """A repeated key with the same body gets the same reply, also after a restart; with another body it gets a 422."""
    first, second = (gateway.chat().headers["x-router-decision-id"] for _ in range(2))
    replies = [send(gateway, first, 0.5, "key-1") for _ in range(3)]
    assert {(r.status_code, r.text) for r in replies} == {
        (200, replies[0].text)
    } and "accepted" in replies[0].text
    for changed in (
        send(gateway, first, 0.6, "key-1"),
        send(gateway, second, 0.5, "key-1"),
    ):
        assert (
            changed.status_code == 422
            and changed.json()["error"]["code"] == "idempotency_key_reused"
        )
    assert send(gateway, first, 0.6, "key-2").json()["status"] == "accepted"
    assert quality_events(gateway) == pytest.approx(1)
    assert send(gateway, second, 0.5, "k" * 256).status_code == 400
    assert send(gateway, "dec-0", 0.5, "key-3").status_code == 404


def test_a_key_outlives_a_restart(tmp_path: Path) -> None:
    """The journal stores an idempotency key together with its effect."""
    first = Gateway(tmp_path)
    with first.client:
        decision_id = first.chat().headers["x-router-decision-id"]
        before = send(first, decision_id, 0.5, "key")
        eventually(lambda: not first.ingress.router_client.outcomes.unsent)
    second = Gateway(tmp_path)
    with second.client:
        assert send(second, decision_id, 0.5, "key").text == before.text
        assert send(second, decision_id, 0.4, "key").status_code == 422


def test_a_key_whose_first_request_is_under_way_is_409(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two requests at the same time one takes effect, and the other gets a 409."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    memory = gateway.router.thing._learner
    flush = gateway.router.thing._journal.flush

    async def slow() -> None:
        await asyncio.sleep(0.3)
        await flush()

    async def both() -> list[str]:
        from policies.events import Feedback

        item = Feedback(decision_id, 1.0, time_s=time.time())
        return await asyncio.gather(
            *(gateway.router.thing.feedback([item], "key") for _ in range(2))
        )

    monkeypatch.setattr(memory.journal, "flush", slow)
    assert gateway.client.portal is not None
    assert gateway.client.portal.call(both) == [["accepted"], ["busy"]]
    monkeypatch.setattr(gateway.router.thing, "feedback", always_busy)
    answer = send(gateway, decision_id, key="key")
    assert (
        answer.status_code == 409
        and answer.json()["error"]["code"] == "idempotency_in_flight"
    )


async def always_busy(*_: Any) -> list[str]:
    return ["busy"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_recorded_with_its_flaw(
    gateway: Gateway, stream: bool
) -> None:
    """The outcome names the flaw, and no score is made up; an ordinary answer has no flaw."""
    import json

    async def silent(task: str, body: dict[str, Any]):  # type: ignore[no-untyped-def]
        part = {"delta": {"content": ""}} if stream else {"message": {"content": ""}}
        text = json.dumps({"choices": [part]})
        yield (f"data: {text}\n\n" if stream else text).encode(), None
        yield b"", ModelReport(7, 1, "stop")

    def flaw(decision_id: str) -> Any:
        where = f"/v1/router/decisions/{decision_id}"
        eventually(lambda: gateway.client.get(where).json().get("outcome"))
        found = gateway.client.get(where).json()
        assert found["feedback"] == []
        return found["outcome"]["flaw"]

    ordinary = gateway.chat(model="small", stream=stream)
    assert flaw(ordinary.headers["x-router-decision-id"]) == ""
    gateway.models["small"].script = silent
    answer = gateway.chat(model="small", stream=stream)
    assert flaw(answer.headers["x-router-decision-id"]) == "empty"


def texts_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("store", [False, True])
def test_prompts_and_answers_are_written_only_where_that_is_switched_on(
    tmp_path: Path, store: bool
) -> None:
    """Otherwise the journal keeps features and a salted hash, which only shows whether two prompts were equal."""
    secret = "zanzibar-4711"
    answer = "small"
    made = Gateway(tmp_path, store_text=store)
    with made.client:
        message = [
            {"role": "system", "content": f"You know {secret}-a."},
            {"role": "user", "content": f"Quick: what is {secret}-b?"},
        ]
        for stream in (False, True):
            for messages in (
                message,
                message,
                [*message, {"role": "user", "content": "other"}],
            ):
                assert (
                    made.chat(
                        messages=messages, stream=stream, model="small"
                    ).status_code
                    == 200
                )
        eventually(lambda: not made.ingress.router_client.outcomes.unsent)
    found = texts_in(tmp_path)
    assert b"prompt_hash" in found
    assert (secret.encode() in found) == store and (
        f"I am {answer}".encode() in found
    ) == store
    decisions = [
        event
        for _, event in made.router.thing._journal.replay()
        if hasattr(event, "prompt_hash")
    ]
    hashes = [decision.prompt_hash for decision in decisions]
    assert (
        len(hashes) == 6
        and len(set(hashes)) == 2
        and all(len(value) == 32 for value in hashes)
    )
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        assert connection.execute("select count(*) from events").fetchone()[0] == 12
    assert all((decision.prompt != "") == store for decision in decisions)


def test_a_stored_decision_has_all_that_its_evaluation_needs(gateway: Gateway) -> None:
    """Profile, eligible arms, propensities, version, and whether the client forced the model."""
    gateway.chat()
    gateway.chat(model="large")
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    rows = [
        event
        for _, event in gateway.router.thing._journal.replay()
        if hasattr(event, "estimates")
    ]
    free, forced = rows
    assert (free.fallback, forced.fallback) == ("", "forced")
    for row in rows:
        assert (
            row.policy_version == "thompson-v0"
            and row.time_s > 0
            and row.profile.features.size > 1
        )
        eligible = [e for e in row.estimates if not e.removed_by]
        assert sum(e.propensity for e in eligible) == pytest.approx(1)
        assert {e.arm for e in row.estimates} == {"small", "large", "minilm"}
    assert [e.arm for e in forced.estimates if not e.removed_by] == ["large"]


def test_the_longest_key_fits_the_database(gateway: Gateway, tmp_path: Path) -> None:
    """PostgreSQL limits characters; a row that it refuses would be retried for ever, before all other rows."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    assert send(gateway, decision_id, 0.5, "k" * 255).status_code == 200
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        ((length,),) = connection.execute("SELECT length(key) FROM replies").fetchall()
    assert (
        length <= 255
        and send(gateway, decision_id, 0.5, "k" * 254).json()["status"] == "duplicate"
    )
