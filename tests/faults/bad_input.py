"""Checks of bad input, forged events, unsafe files and jumping clocks (see catalogue.py)."""

import asyncio
import copy
import gc
import itertools
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import yaml

from deployments.access.middleware import OPEN_PATHS
from deployments.journal.snapshot import Snapshot
from deployments.operations.config_check import check_config
from policies.events import Feedback, Outcome
from policies.feedback.decision_records import DecisionRecords
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.deployments.access.test_api_keys import Locked
from tests.deployments.operations.test_config_check import every_key
from tests.faults.catalogue import ALONE, TEST, Fault, Finding
from tests.support.gateway import ROOT, Gateway, eventually
from tests.support.hostile_input import CORPUS, JSON, fuzz, openai_shape
from tests.support.requests import make_profile

CHAT = "/v1/chat/completions"
FUZZ_CASES = 2_000


def t9(_: Path) -> Finding:
    """Compare the posterior after repeated and shuffled events with that after each event once."""
    arms = (Arm("small"), Arm("large"))
    rng = np.random.default_rng(0)
    worst = 0.0
    policy = Thompson(arms)
    made = policy.decide(
        [
            Request(f"d{i}", make_profile(f"{i} plus {i}"), Objective())
            for i in range(40)
        ],
        {},
        rng,
        0,
    )
    events = [
        Outcome(d.id, "ok", 0.1, 0.3 + i / 50, 20, 5 + i) for i, d in enumerate(made)
    ]
    events += [Feedback(d.id, i / 40, "user") for i, d in enumerate(made)]  # type: ignore[arg-type]
    reference = Thompson(arms)
    decision_records = DecisionRecords()
    for event in (*made, *events):
        decision_records.apply(event, reference)
    wanted = reference.state()
    # the drift test depends on the order of events by design
    posterior = [name for name in wanted if not name.startswith("drift.")]
    again = Thompson(arms)
    decision_records = DecisionRecords()
    for event in (*made, *(event for event in events for _ in range(3))):
        decision_records.apply(event, again)
    twice = max(
        float(np.abs(value - wanted[name]).max(initial=0.0))
        for name, value in again.state().items()
    )
    for shuffle in range(50):
        again = Thompson(arms)
        decision_records = DecisionRecords()
        shuffled = random.Random(shuffle)
        many = [event for event in events for _ in range(shuffled.randint(1, 5))]
        shuffled.shuffle(many)
        for event in (*made, *many):
            decision_records.apply(event, again)
        state = again.state()
        worst = max(
            worst,
            *(
                float(np.abs(state[name] - wanted[name]).max(initial=0.0))
                for name in posterior
            ),
        )
    figure = (
        f"posterior differs by {worst:.1e} at most in 50 shuffles; repeated in "
        f"order, all of the state by {twice:.0e}"
    )
    return Finding(figure, worst <= 1e-9 and twice == 0.0)


def t10(folder: Path) -> Finding:
    """Send feedback that is forged, belongs to another key, or is not a score."""
    locked = Locked(folder, scores_per_minute=10_000, requests_per_minute=10_000)
    rng = random.Random(2)
    with locked.client:
        mine = [locked.ask("ann").headers["x-router-decision-id"] for _ in range(5)]
        # wait until the router has learned the outcomes
        eventually(lambda: not locked.ingress.router_client.outcomes.unsent)
        before = locked.router.thing._policy.state()
        rejected = 0
        for i in range(1_000):
            kind = i % 4
            decision = rng.choice(mine) if kind else f"dec-{rng.getrandbits(128):032x}"
            score = [b"1.0", b"NaN", b"1e308", b"0.5"][kind]
            if kind == 2:
                score = rng.choice(
                    [
                        b"1e308",
                        b'"true"',
                        b"true",
                        b"-0.01",
                        b"null",
                        b"[]",
                        b"Infinity",
                    ]
                )
            body = b'{"decision_id": "%b", "score": %b}' % (decision.encode(), score)
            headers = {
                **JSON,
                "authorization": f"Bearer {locked.keys['ben' if kind == 3 else 'ann']}",
            }
            rejected += locked.client.post(
                "/v1/feedback", content=body, headers=headers
            ).status_code in (400, 404)
        after = locked.router.thing._policy.state()
    same = all(np.array_equal(before[name], after[name]) for name in before)
    return Finding(
        f"{rejected / 10:g} % refused, posterior {'un' if same else ''}changed",
        rejected == 1_000 and same,
    )


def t16(folder: Path) -> Finding:
    """Send the corpus of bad input, and cases generated from the OpenAPI schema."""
    gateway = Gateway(folder)
    process = psutil.Process()
    shaped = 0
    server_errors = 0
    stalls = []
    with gateway.client:
        gateway.chat()
        gc.collect()
        gc.freeze()  # as Serve does in its replicas
        before = process.memory_info().rss
        for content, _ in CORPUS.values():
            tries = [_longest_stall(gateway, content) for _ in range(3)]
            answer = tries[0][0]
            # the smallest of three, since other programs also stall the event loop
            stalls.append(min(seconds for _, seconds in tries))
            server_errors += answer.status_code >= 500
            shaped += openai_shape(answer.json())
        grown = (process.memory_info().rss - before) / 2**20
        answers = fuzz(gateway, FUZZ_CASES)
    cases = sum(answers.values())
    figure = (
        f"{server_errors} of {len(CORPUS)} and 0 of {cases} were 5xx, {shaped / len(CORPUS):.0%} in OpenAI's shape, "
        f"{grown:.0f} MB more memory, event loop stalled for {1000 * max(stalls):.0f} ms at most"
    )
    held = (
        server_errors == 0
        and shaped == len(CORPUS)
        and grown < 50
        and max(stalls) < 0.1
    )
    return Finding(figure, held)


def _longest_stall(gateway: Gateway, content: Any) -> tuple[Any, float]:
    """An answer, and the longest time for which it blocked the gateway's event loop."""
    longest = [0.0]
    stop = [False]

    async def beat() -> None:
        while not stop[0]:
            began = time.perf_counter()
            await asyncio.sleep(0.002)
            longest[0] = max(longest[0], time.perf_counter() - began - 0.002)

    assert gateway.client.portal is not None
    task = gateway.client.portal.start_task_soon(beat)
    answer = gateway.client.post(CHAT, content=content, headers=JSON)
    stop[0] = True
    task.result()
    return answer, longest[0]


def t26(folder: Path) -> Finding:
    """Call every route without a key, and the operator routes with the key of a client.

    The paths of the documentation and those for load balancers are open by design; they tell nothing of the system.
    """
    locked = Locked(folder)
    with locked.client:
        app = locked.ingress.__serve_build_asgi_app__()
        routes = {
            (method, route.path)
            for route in app.routes
            for method in getattr(route, "methods", ())
        }
        closed = [
            route
            for route in routes
            if route[1] not in OPEN_PATHS or route[1].startswith("/v1")
        ]
        open_ = [
            route
            for route in closed
            if locked.client.request(*route).status_code != 401
        ]
        operate = [
            route
            for route in closed
            if route[1].startswith("/v1/router") and "decisions" not in route[1]
        ]
        open_ += [
            route for route in operate if locked.call("ann", *route).status_code != 403
        ]
    return Finding(
        f"{len(open_)} of {len(closed)} routes answer without the right key", not open_
    )


def t27(folder: Path) -> Finding:
    """Load policy versions with arrays that are not finite, have another shape or are missing.

    Pickles are tested in tests/deployments/tracking/test_model_registry.py.
    """
    gateway = Gateway(folder)
    accepted = []
    router = gateway.router.thing
    good = router._policy.state()
    name = next(name for name, value in good.items() if value.ndim > 1)
    spoilt = {
        "NaN": {**good, name: np.full_like(good[name], np.nan)},
        "infinite": {**good, name: np.full_like(good[name], np.inf)},
        "another shape": {**good, name: good[name][..., :-1]},
        "a missing array": {key: value for key, value in good.items() if key != name},
    }
    for what, state in spoilt.items():
        try:
            if asyncio.run(
                router.adopt(
                    Snapshot("thompson", ("small", "large", "minilm"), 7, 3, state)
                )
            ):
                accepted.append(what)
        except ValueError:
            pass
    same = all(
        np.array_equal(good[key], value)
        for key, value in router._policy.state().items()
    )
    return Finding(
        f"{len(accepted)} of {len(spoilt)} accepted {accepted or ''}",
        not accepted and same,
    )


def t28(folder: Path) -> Finding:
    """Let the clock jump by an hour, forth and back, at every reading."""
    gateway = Gateway(folder)
    real = time.time
    jump = itertools.cycle([0.0, 3600.0, -3600.0])
    outcomes = []
    with gateway.client, mock.patch("time.time", lambda: real() + next(jump)):
        ids = [
            gateway.chat(stream=True).headers["x-router-decision-id"] for _ in range(40)
        ]
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        for decision_id in ids:
            outcome = gateway.client.get(f"/v1/router/decisions/{decision_id}").json()[
                "outcome"
            ]
            outcomes.append(
                (outcome["latency_s"], outcome["ttft_s"], outcome["status"])
            )
        state = gateway.client.get("/v1/router/state").json()["models"]
    wrong = sum(
        latency < 0 or ttft < 0 or latency > 600 or status != "ok"
        for latency, ttft, status in outcomes
    )
    sane = all(
        0 <= (model["figures"]["ttft_p95_s"] or 0) < 600 and model["in_flight"] == 0
        for model in state.values()
    )
    return Finding(
        f"{wrong} of {len(outcomes)} outcomes with an impossible time",
        wrong == 0 and sane,
    )


def t29(_: Path) -> Finding:
    """Add a letter to each key of serve_config.yaml in turn."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    caught = 0
    keys = 0
    for path in every_key(config):
        if "engine_kwargs" in path:
            continue  # vLLM checks its own arguments
        broken = copy.deepcopy(config)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        keys = keys + 1
        caught = caught + bool(check_config(broken))
    return Finding(f"{caught} of {keys} caught", caught == keys)


FAULTS = [
    Fault(
        "T9", "feedback and outcomes repeated and reordered", "≤ 1e-9", t9, tier=TEST
    ),
    Fault("T10", "1,000 forged, foreign or malformed scores", "100 %, unchanged", t10),
    Fault("T16", "bad input", "0, 100 %, < 50 MB, < 100 ms", t16, tier=ALONE),
    Fault("T26", "routes without a key", "0", t26),
    Fault("T27", "unsafe policy versions", "0", t27, tier=TEST),
    Fault("T28", "the clock jumps", "0", t28, tier=TEST),
    Fault("T29", "typos in serve_config.yaml", "100 %", t29),
]
