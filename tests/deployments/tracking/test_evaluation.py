"""The report of an evaluation says which decisions it used, and why others were left out."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from deployments.tracking.evaluation import Evaluator
from policies.events import Decision, Feedback, Outcome
from policies.types import Objective, Request
from tests.deployments.router.test_rollout import System, make_settings
from tests.support.requests import make_profile

JUDGED = 300
OTHERS = 500
BOUND = 40
FORCED = 30


async def serve(
    system: System, count: int, objective: Objective, chance: float, forced: bool
) -> list[Decision]:
    """Requests with an answer each; `large` is right, and only answers of a known chance of 1 are scored."""
    made: list[Decision] = []
    while len(made) < count:
        requests = [
            Request(
                system.learner.ids.new_id(time.time()),
                make_profile(f"What is {n}?"),
                objective,
                forced=forced,
                score_chance=chance,
            )
            for n in range(min(10, count - len(made)))
        ]
        decisions = await system.router.decide(requests, "test", {})
        outcomes = [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9)) for d in decisions]
        await system.router.observe(outcomes, "test", {})
        if chance == 1.0:
            scores = [Feedback(d.id, float(d.arm == "large")) for d in decisions]
            await system.router.feedback(scores)
        made += decisions
    return made


def test_an_evaluation_uses_a_judge_s_sample_and_says_so(tmp_path: Path) -> None:
    """The decisions outside of it, forced ones and those with one eligible arm are counted by their reason."""

    async def play() -> dict[str, object]:
        system = System(make_settings(tmp_path, "uniform"))
        champion = await system.version(1)
        free = Objective()
        await serve(system, JUDGED, free, 1.0, forced=False)
        await serve(system, OTHERS, free, 0.01, forced=False)
        await serve(system, BOUND, Objective(models=("small",)), 1.0, forced=False)
        await serve(system, FORCED, Objective(models=("large",)), 1.0, forced=True)
        challenger = replace(
            champion, version=2, policy="always", options={"arm": "large"}, state={}
        )
        return Evaluator(system.settings).evaluate(challenger, champion)

    report = asyncio.run(play())
    assert report["decisions"] == report["randomised"] == JUDGED
    assert report["feedback"] == JUDGED
    assert report["logged"] == JUDGED + OTHERS + BOUND + FORCED
    assert report["left_out"] == {
        "outside of the scored sample": OTHERS,
        "no other arm was eligible": BOUND,
        "the client chose the model": FORCED,
    }
    assert report["promote"]
