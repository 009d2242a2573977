"""Writes and reads the state of a release, with the code of the folder that it is run in.

The root of a release's source tree is the working folder:

    python PATH/release.py write FOLDER   a journal, a file of keys, a policy version and the configuration
    python PATH/release.py read URL       prints what a journal has taught, as JSON
    python PATH/release.py extend URL     adds a decision with outcome and score to a journal, then reads it
    python PATH/release.py forget URL     marks the scores of a journal as forgotten, then reads it

tests/upgrades/release-0.1.0/ was written so by release 0.1.0.
"""

import asyncio
import json
import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import sqlalchemy as sa  # noqa: E402
from msgspec import structs  # noqa: E402

from deployments.access import api_keys  # noqa: E402
from deployments.journal.journal import Journal  # noqa: E402
from deployments.router.learner import Learner  # noqa: E402
from deployments.tracking.version_files import save_policy  # noqa: E402
from policies.base import Policy  # noqa: E402
from policies.events import Feedback, Outcome  # noqa: E402
from policies.registry import make_policy  # noqa: E402
from policies.types import Arm, Objective, Request  # noqa: E402
from tests.support.requests import make_profile  # noqa: E402

ARMS = (
    Arm("small", context_tokens=512, output_price_usd=1e-6),
    Arm("large", context_tokens=512, output_price_usd=1e-5),
    Arm("minilm", tasks=("embed",), context_tokens=10_000),
)
CHATS = 24
QUESTIONS = (
    "What is {n} plus 5?",
    "Write a function that returns {n}.",
    "Which day is it?",
)


def write(folder: Path) -> None:
    """Write the files of this release, and what they must teach a later one."""
    from tests.support.gateway import Gateway, eventually

    folder.mkdir(parents=True)
    gateway = Gateway(folder)
    # settings are stored when they change: to these, and back when the ingress starts
    other = gateway.settings.model_copy(update={"feedback_window_days": 1.0})
    asyncio.run(gateway.router.thing.configure(other))
    with gateway.client as client:
        for number in range(CHATS):
            if number == CHATS // 2:
                gateway.router.thing._learner.put_snapshot()
            question = QUESTIONS[number % len(QUESTIONS)].format(n=number)
            answer = gateway.chat(messages=[{"role": "user", "content": question}])
            body = {
                "decision_id": answer.headers["x-router-decision-id"],
                "score": float(answer.headers["x-router-model"] == "large"),
            }
            client.post("/v1/feedback", json=body).raise_for_status()
        early = gateway.ingress.router_client.new_id()
        client.post(
            "/v1/feedback",
            json={"decision_id": early, "score": 1.0},
            headers={"idempotency-key": "early"},
        ).raise_for_status()
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    gateway.router.thing._journal.engine.dispose()
    path = folder / "journal.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        # the later snapshot is enough, and the file stays small
        connection.execute("DELETE FROM snapshots WHERE row = 0")
    connection.execute("VACUUM")
    connection.close()
    secrets = {
        name: api_keys.add(folder / "keys.json", name, scopes, requests_per_minute=30)
        for name, scopes in (("app", ("infer", "feedback")), ("ops", ("operate",)))
    }
    shutil.copy(ROOT / "serve_config.yaml", folder / "serve_config.yaml")
    learner = open_learner(f"sqlite:///{path}")
    (folder / "version").mkdir()
    digest = save_policy(learner.snapshot(), folder / "version")
    fields = {
        kind: shape(msgspec.msgpack.decode(encoded))
        for _, _, kind, encoded in learner.journal.rows(0, 10**6)
    }
    inspector = sa.inspect(learner.journal.engine)
    tables = {
        table: {
            column["name"]: str(column["type"])
            for column in inspector.get_columns(table)
        }
        for table in sorted(inspector.get_table_names())
    }
    expected = {
        "learned": read(f"sqlite:///{path}"),
        "keys": secrets,
        "digest": digest,
        "early": early,
        "tables": tables,
        "fields": fields,
    }
    text = json.dumps(expected, separators=(",", ":"))
    (folder / "expected.json").write_text(text + "\n")
    learner.journal.engine.dispose()


def shape(event: dict[str, Any]) -> dict[str, int]:
    """The fields of a stored event, each with the length of the tuples that it has; 0 if it has none."""
    return {
        name: len(value[0])
        if isinstance(value, list) and value and isinstance(value[0], list)
        else 0
        for name, value in event.items()
    }


def open_learner(url: str) -> Learner:
    """The learner of a journal."""
    return Learner(Journal(url), lambda: make_policy("thompson", ARMS))


def read(url: str) -> dict[str, Any]:
    """What a journal has taught: its size, its salt and the posterior."""
    learner = open_learner(url)
    found = {
        "salt": learner.journal.salt.hex(),
        "last_row": learner.journal.last_row,
        "sequence": learner.sequence,
        "scored": learner.records.scored,
        "posterior": posterior(learner.policy, learner.sequence),
    }
    learner.journal.engine.dispose()
    return found


def posterior(policy: Policy, sequence: int) -> dict[str, list[float]]:
    """The arrays of a policy."""
    # the first decision after a restart computes the posterior
    request = Request("-", make_profile(), Objective())
    policy.decide([request], {}, np.random.default_rng(0), sequence)
    return {name: np.ravel(array).tolist() for name, array in policy.state().items()}


def extend(url: str) -> dict[str, Any]:
    """Add a decision with outcome and score, and a snapshot; then read the journal."""
    learner = open_learner(url)
    now = time.time()
    request = Request(learner.ids.new_id(now), make_profile(), Objective())
    rng = np.random.default_rng(0)
    (made,) = learner.policy.decide([request], {}, rng, learner.sequence)
    made = structs.replace(made, time_s=now)

    async def put() -> None:
        learner.record_decisions([made])
        outcome = Outcome(made.id, "ok", 0.1, 0.5, 20, 9)
        await learner.observe([(made, outcome)], now)
        await learner.feedback([Feedback(made.id, 1.0, time_s=now)], now)
        learner.put_snapshot()
        await learner.journal.flush()

    asyncio.run(put())
    learner.journal.engine.dispose()
    return read(url)


def forget(url: str) -> dict[str, Any]:
    """Mark all scores as forgotten, and learn from the journal again without them; then read it."""
    from deployments.journal.forgotten import Mark

    learner = open_learner(url)
    learner.journal.put_mark(Mark(up_to=learner.journal.last_row, reason="a bad hour"))
    learner.policy = make_policy("thompson", ARMS)
    learner.sequence = 0
    learner._replay_journal(ignore_snapshot=True)
    learner.put_snapshot()
    asyncio.run(learner.journal.flush())
    learner.journal.engine.dispose()
    return read(url)


if __name__ == "__main__":
    verb, target = sys.argv[1:]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if verb == "write":
        write(Path(target))
    else:
        print(
            json.dumps({"read": read, "extend": extend, "forget": forget}[verb](target))
        )
