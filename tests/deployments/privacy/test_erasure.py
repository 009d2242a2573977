"""Erasure and export: nothing of a person is left in any table or file, and what was learned stays the same."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from deployments.journal.ids import trace_id
from deployments.journal.personal_data import Person
from deployments.journal.tables import (
    EVENTS,
    FORGOTTEN,
    IDEMPOTENT_REPLIES,
    METADATA,
    SNAPSHOTS,
)
from deployments.privacy.records import ErasureState
from deployments.router.actor import Router
from deployments.settings import GatewaySettings
from policies.events import ANY_OWNER, Decision, Feedback, Outcome
from policies.types import Objective, Request
from tests.support.requests import make_profile

WHO = {"ann": ("u1", "u2"), "ben": ("u3",)}  # keys, and their clients' users
PEOPLE: dict[str, Callable[[Router], Person]] = {
    "ann": lambda _: Person(key="ann"),
    "u1": lambda router: Person(user=router._learner.ids.user_hash("u1")),
}


def make(url: str) -> Router:
    settings = GatewaySettings.model_validate(
        {"models": {"small": {}, "large": {}}, "journal": url, "store_text": True}
    )
    router = Router(settings, lambda _: {})
    router._rng = np.random.default_rng(1)
    return router


async def serve(router: Router, count: int) -> list[tuple[str, str, Decision]]:
    """Answers with text and scores for each user; returns key, user and decision."""
    made = []
    ids = router._learner.ids
    for i in range(count):
        for key, users in WHO.items():
            for user in users:
                name = f"{user}-{time.time_ns()}"
                pair = ids.new_id(time.time()) if i % 3 == 0 else ""
                request = Request(
                    ids.new_id(time.time()),
                    make_profile(f"What is {i}?"),
                    Objective(),
                    prompt_hash=ids.hash(name),
                    prompt=f"a question of {name}",
                    owner=key,
                    pair=pair,
                    users=(ids.user_hash(user),),
                )
                (decision,) = await router.decide([request], "test", {})
                outcome = Outcome(
                    decision.id, "ok", 0.1, 0.3, 20, 9, answer=f"an answer to {name}"
                )
                await router.observe([(decision, outcome)], "test", {})
                await router.feedback(
                    [
                        Feedback(
                            decision.id, i % 2, "user", time.time(), key, given_by=key
                        )
                    ],
                    f"{key}/{name}",
                )
                made.append((key, user, decision))
                if pair:
                    # the second answer has no owner, and the same text
                    (second,) = await router.decide(
                        [
                            Request(
                                pair,
                                request.profile,
                                Objective(),
                                prompt=f"a question of {name}",
                                pair=decision.id,
                            )
                        ],
                        "test",
                        {},
                    )
                    await router.observe(
                        [(second, Outcome(second.id, answer=f"second to {name}"))],
                        "test",
                        {},
                    )
                    made.append((key, user, second))
    return made


def belongs(who: str, key: str, user: str) -> bool:
    return who in (key, user)


def everything(url: str, router: Router) -> bytes:
    """All that the database has: each value of each table, and for SQLite also every byte of its files."""
    found = []
    with router._journal.engine.connect() as connection:
        for table in (EVENTS, FORGOTTEN, SNAPSHOTS, IDEMPOTENT_REPLIES, METADATA):
            for row in connection.execute(sa.select(table)):
                found += [
                    value if isinstance(value, bytes) else str(value).encode()
                    for value in row
                ]
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        files = [file for file in path.parent.iterdir() if file.is_file()]
        assert path in files
        found += [file.read_bytes() for file in files]
    return b"\0".join(found)


def traces_of(decision: Decision) -> list[bytes]:
    """The texts and ids by which a decision can be found."""
    texts = [decision.prompt, decision.id, trace_id(decision.id), decision.prompt_hash]
    return [text.encode() for text in texts if text]


def learned(router: Router) -> dict[str, Any]:
    policy = router._policy
    policy.advance(router._sequence + 500, router._learner.records.scored + 500)
    return policy.state()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[name], other[name], rtol=1e-9, atol=1e-9) for name in one
    )


@pytest.mark.parametrize("who", PEOPLE)
def test_nothing_of_a_person_is_left_and_nothing_learned_is_lost(
    url: str, who: str
) -> None:
    """Texts, ids and hashes are in no table and no file; other people's data and the posterior are as before."""

    async def play() -> None:
        router = make(url)
        made = await serve(router, 10)
        await router._learner.save()
        # retention and snapshots have left free pages before
        made += await serve(router, 10)
        person = PEOPLE[who](router)
        held = router._learner.ids.new_id(time.time())
        early = Feedback(held, 0.5, "user", time.time(), "ann", given_by="ann")
        assert await router.feedback([early]) == ["pending"]
        await router._learner.save()
        mine = [d for key, user, d in made if belongs(who, key, user)]
        others = [d for key, user, d in made if not belongs(who, key, user)]
        content = everything(url, router)
        assert all(text in content for d in mine for text in (d.prompt.encode(),))

        erasure = await router.erase(person)
        assert erasure.state is ErasureState.DONE
        assert erasure.decisions == len(mine)
        content = everything(url, router)
        left = [text for d in mine for text in traces_of(d) if text in content]
        assert not left, left[:3]
        assert (held.encode() in content) == (who != "ann")
        assert all(d.prompt.encode() in content for d in others)
        assert all(d.id.encode() in content for d in others)
        if person.user:
            assert person.user.encode() not in content
        for decision in mine:
            assert await router.record(decision.id) is None

        again = make(url)
        assert again._sequence == router._sequence
        assert again._arm_stats.totals == router._arm_stats.totals
        assert same(learned(again), learned(router))
        ids, scores = await again.personal_ids(person)
        assert not ids and not scores
        # both go on learning
        await serve(again, 2)

    asyncio.run(play())


def test_scores_of_a_key_for_others_answers_are_erased(url: str) -> None:
    """A judge's key scores answers of other keys; its scores are erased, and the answers stay."""

    async def play() -> None:
        router = make(url)
        made = await serve(router, 5)
        judged = [
            Feedback(d.id, 0.25, "external", time.time(), ANY_OWNER, given_by="judge")
            for _, _, d in made[:7]
        ]
        assert set(await router.feedback(judged)) == {"accepted"}
        before = learned(router)
        ids, lines = await router.personal_ids(Person(key="judge"))
        assert not ids and len(lines) == 7
        assert {json.loads(line)["score"]["score"] for line in lines} == {0.25}
        erasure = await router.erase(Person(key="judge"))
        assert (erasure.decisions, erasure.scores) == (0, 7)
        assert b"external" not in everything(url, router)
        again = make(url)
        assert same(learned(again), before)
        assert all([await again.record(d.id) for _, _, d in made])

    asyncio.run(play())


@pytest.mark.parametrize("who", PEOPLE)
def test_an_export_has_everything_of_the_person_and_nothing_of_others(
    url: str, who: str
) -> None:
    """Each decision has a line with its outcome, its scores and its text."""

    async def play() -> None:
        router = make(url)
        made = await serve(router, 6)
        ids, others = await router.personal_ids(PEOPLE[who](router))
        lines = [json.loads(line) for line in await router.personal_lines(ids)]
        mine = {d.id: d for key, user, d in made if belongs(who, key, user)}
        assert {line["decision"]["id"] for line in lines} == set(mine) and not others
        for line in lines:
            decision = mine[line["decision"]["id"]]
            assert line["decision"]["prompt"] == decision.prompt
            assert len(line["decision"]["profile"]["features"]) > 10
            assert line["outcome"]["answer"]
            owned = decision.owner != ""
            assert [score["source"] for score in line["scores"]] == ["user"] * owned

    asyncio.run(play())


def test_rows_that_arrive_during_an_erasure_keep_their_lessons(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of the person and of others go on; a restart afterwards has learned the same."""

    async def play() -> None:
        router = make(url)
        await serve(router, 10)
        erasing = asyncio.create_task(router.erase(Person(key="ann")))
        served = []
        while not erasing.done():
            served += await serve(router, 1)
            await asyncio.sleep(0)
        await erasing
        await router._journal.flush()
        assert len(served) > 3
        again = make(url)
        assert same(learned(again), learned(router))
        theirs = [d for key, _, d in served if key == "ben"]
        assert all([await again.record(d.id) for d in theirs])

    asyncio.run(play())


def test_an_erasure_that_a_crash_interrupted_says_so(tmp_path: Path) -> None:
    """The router does not know any more whose data they were, so the erasure must be asked for again."""
    url = f"sqlite:///{tmp_path}/journal.db"

    async def play() -> None:
        router = make(url)
        await serve(router, 3)
        reached = asyncio.Event()

        async def never(*_: Any) -> None:
            reached.set()
            await asyncio.Event().wait()

        router._journal.personal_data.erase = never  # type: ignore[method-assign]
        erasing = asyncio.create_task(router.erase(Person(key="ann")))
        await reached.wait()
        erasing.cancel()
        again = make(url)
        (erasure,) = await again.erasures()
        assert erasure.state is ErasureState.INTERRUPTED
        assert (await again.erase(Person(key="ann"))).state is ErasureState.DONE
        for task in router._privacy._tasks:
            task.cancel()

    asyncio.run(play())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader that holds the write-ahead log is waited for without a pause."""
    monkeypatch.setattr("deployments.journal.personal_data.CHECKPOINT_PAUSE_S", 0.01)
    yield
