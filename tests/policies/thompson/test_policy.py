"""The Thompson policy: it learns, follows the objective and the load, and forgets."""

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from policies.base import prior_quality
from policies.constraints import Exclusion
from policies.events import Decision, Outcome
from policies.objectives import with_text_sensitivity
from policies.registry import make_policy
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, ModelState, Objective, Request
from tests.support.requests import make_profile, make_request

ARMS = (
    Arm("small", prompt_price_usd=1e-6, output_price_usd=1e-6),
    Arm("large", prompt_price_usd=1e-5, output_price_usd=1e-5),
)
EASY = "What is 3 plus 5?"
HARD = "Ann has 384 apples and buys 7 bags of 219 apples, and then 12 more. How many has she?"
OBJECTIVE = Objective(latency_weight=0.2, cost_weight=500)


def right(arm: str, hard: bool) -> float:
    return 0.97 if arm == "large" else 0.05 if hard else 0.95


def answer(decision: Decision) -> Outcome:
    slow = decision.arm == "large"
    return Outcome(
        decision.id,
        "ok",
        0.05 if slow else 0.02,
        0.6 if slow else 0.1,
        20,
        50 if slow else 10,
    )


def play(
    policy: object, rounds: int, seed: int, start: int = 0, quality=right
) -> list[float]:  # type: ignore[no-untyped-def]
    """Expected utilities of a stream in which every third task is hard."""
    rng = np.random.default_rng(seed)
    worth = []
    for i in range(start, start + rounds):
        hard = bool(rng.random() < 1 / 3)
        request = Request(str(i), make_profile(HARD if hard else EASY), OBJECTIVE)
        (decision,) = policy.decide([request], {}, rng, i)  # type: ignore[attr-defined]
        outcome = answer(decision)
        policy.learn(decision, outcome)  # type: ignore[attr-defined]
        policy.score(decision, float(rng.random() < quality(decision.arm, hard)))  # type: ignore[attr-defined]
        price = ARMS[decision.arm == "large"].output_price_usd
        worth.append(
            OBJECTIVE.utility(
                quality(decision.arm, hard), outcome.latency_s, price * 70
            )
        )
    return worth


def test_it_beats_every_fixed_choice_and_chance() -> None:
    """After 200 requests, in the mean of 10 seeds, by a margin; no fixed arm is right for both kinds of task."""
    late = {
        name: np.mean(
            [
                np.mean(play(make_policy(kind, ARMS, options), 300, seed)[200:])
                for seed in range(10)
            ]
        )
        for name, kind, options in [
            ("thompson", "thompson", {}),
            ("small", "always", {"arm": "small"}),
            ("large", "always", {"arm": "large"}),
            ("uniform", "uniform", {}),
        ]
    }
    assert late["thompson"] > max(late["small"], late["large"], late["uniform"]) + 0.03


def test_it_follows_an_arm_that_silently_gets_worse() -> None:
    """After `large` breaks, the mean of 5 seeds is back within 0.1 of the best that is left."""
    worth = []
    for seed in range(5):
        policy = Thompson(ARMS, ThompsonSettings(forgetting=0.99))
        play(policy, 400, seed)
        worth.append(
            np.mean(
                play(
                    policy,
                    400,
                    seed,
                    400,
                    lambda arm, hard: 0.1 if arm == "large" else 0.6,
                )[200:]
            )
        )
    best = OBJECTIVE.utility(0.6, 0.1, 70e-6)
    assert np.mean(worth) > best - 0.1


def test_an_expected_score_is_a_score() -> None:
    """In [0, 1], however extreme the scores and the features are, and in the utility that is compared as well."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(3)
    for i in range(300):
        (decision,) = policy.decide(
            [Request(str(i), make_profile(EASY), OBJECTIVE)], {}, rng, i
        )
        policy.score(decision, float(decision.arm == "large"))
    expected = []
    for i, scale in enumerate([1.0, 1.5, 3.0, -1.0, -3.0]):
        profile = make_profile(EASY)
        features = tuple(scale * value for value in profile.features)
        request = Request(
            f"x{i}",
            replace(profile, features=features),
            Objective(latency_weight=0.0, cost_weight=0.0),
        )
        (decision,) = policy.decide([request], {}, rng, 300)
        expected += [
            (estimate.quality, estimate.utility) for estimate in decision.estimates
        ]
    quality = np.array(expected)[:, 0]
    assert (quality >= 0.0).all() and (quality <= 1.0).all()
    # The linear model went beyond both ends.
    assert quality.min() == 0.0 and quality.max() == decision.estimates[0].availability
    assert [worth for _, worth in expected] == pytest.approx(quality.tolist())


def test_prior_quality_rises_by_a_tenth_for_ten_times_the_price() -> None:
    """An operator's `prior_quality` replaces it; a model without a price gets the neutral prior."""
    assert prior_quality(ARMS) == pytest.approx([0.45, 0.55])
    told = replace(ARMS[0], prior_quality=0.7)
    free = Arm("free")
    assert prior_quality((told, ARMS[1], free)) == pytest.approx([0.7, 0.55, 0.5])
    assert prior_quality((free,)) == pytest.approx([0.5])


def test_a_changed_price_takes_effect_at_the_next_decision() -> None:
    """What was learned stays; only the trade-off moves."""
    policy = Thompson(ARMS)
    play(policy, 300, 0)
    dear = replace(OBJECTIVE, cost_weight=1e5)
    chosen = {
        policy.decide([make_request(HARD, dear)], {}, np.random.default_rng(s), 300)[
            0
        ].arm
        for s in range(20)
    }
    assert chosen == {"small"}


def test_load_moves_traffic_before_it_was_ever_seen() -> None:
    """With 60 requests in flight on `large`, a request in haste goes to `small`; with none it does not."""
    policy = Thompson(ARMS)
    play(policy, 300, 0)
    hasty = Objective(latency_weight=0.6, cost_weight=0)

    def share(states: dict[str, ModelState]) -> float:
        chosen = [
            policy.decide(
                [make_request(HARD, hasty)], states, np.random.default_rng(s), 300
            )[0]
            for s in range(50)
        ]
        return float(np.mean([d.arm == "large" for d in chosen]))

    assert share({}) > 0.8
    assert share({"large": ModelState(in_flight=60)}) < 0.3
    assert share({"large": ModelState(in_flight=60, replicas=60)}) > share(
        {"large": ModelState(in_flight=60)}
    )


@pytest.mark.parametrize("ttft_s", [0.4, 0.0])
def test_queue_wait_counts_but_is_not_learned_as_the_arms_latency(
    ttft_s: float,
) -> None:
    """Waiting does not change what an outcome teaches; an expected wait adds to the latency and moves requests away."""
    at_once = Thompson(ARMS)
    late = Thompson(ARMS)
    rng = np.random.default_rng(0)
    for i in range(60):
        for policy, waited_s in ((at_once, 0.0), (late, 3.0)):
            (decision,) = policy.decide(
                [make_request(HARD, Objective(models=("large",)))], {}, rng, i
            )
            told = ttft_s + waited_s if ttft_s else 0.0
            policy.learn(
                decision,
                Outcome(
                    decision.id, "ok", told, 2.4 + waited_s, 20, 101, waited_s=waited_s
                ),
            )
    request = make_request(HARD, Objective(latency_weight=1.0))
    waits = {"large": ModelState(wait_s=3.0)}
    here, there = (
        policy.decide([request], {}, rng, 60)[0].estimate("large")
        for policy in (at_once, late)
    )
    assert there.latency_s == pytest.approx(
        here.latency_s
    ) and there.ttft_s == pytest.approx(here.ttft_s)
    (decision,) = at_once.decide([request], waits, rng, 60)
    assert (
        decision.estimate("large").latency_s == pytest.approx(here.latency_s + 3.0)
        and decision.arm != "large"
    )


def test_an_abandoned_answer_teaches_a_lower_bound_of_the_latency() -> None:
    """Otherwise an arm that hangs would be chosen for ever. A short wait teaches next to nothing."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    expected = []
    for latency_s in (0.4, 0.0, 0.05, 10.0):
        for i in range(40):
            (decision,) = policy.decide(
                [make_request(HARD, Objective(models=("large",)))], {}, rng, i
            )
            status, tokens = ("ok", 11) if latency_s == 0.4 else ("disconnected", 0)
            policy.learn(
                decision, Outcome(decision.id, status, 0.0, latency_s, 20, tokens)
            )
        expected.append(
            policy.decide([make_request(HARD)], {}, rng, 40)[0]
            .estimate("large")
            .latency_s
        )
    assert expected[0] == expected[1] == pytest.approx(0.4, rel=0.25)
    assert expected[2] == pytest.approx(expected[1], rel=1e-2)
    assert expected[3] > 2.0


@pytest.mark.parametrize("streamed", [True, False])
def test_an_abandoned_answer_teaches_the_same_in_any_order(streamed: bool) -> None:
    """What a bound teaches does not depend on what was learned before it, so a restart derives the same state."""
    first, second = Thompson(ARMS), Thompson(ARMS)
    rng = np.random.default_rng(0)
    events = []
    for i in range(60):
        (decision,) = first.decide([make_request(HARD)], {}, rng, i)
        left = i % 3 == 0
        status = "disconnected" if left else "ok"
        ttft_s = 0.0 if left else 0.1 + 0.05 * (i % 7)
        tokens = 0 if left else 40
        outcome = Outcome(
            decision.id, status, ttft_s, 3.0, 20, tokens, streamed=streamed
        )
        events.append((decision, outcome))
    for policy, order in ((first, events), (second, events[::-1])):
        for n, (decision, outcome) in enumerate(order):
            policy.learn(decision, outcome)
            if n % 5 == 0:  # σ² is estimated anew
                policy.decide([make_request(HARD)], {}, rng, 60)
        policy.decide([make_request(HARD)], {}, rng, 60)
    one, other = first.state(), second.state()
    for name in ("ttft.count", "ttft.moment", "ttft.squares", "tpot.count"):
        assert one[name] == pytest.approx(other[name], rel=1e-9), name


def test_a_missing_score_still_teaches_latency() -> None:
    """Outcomes alone move the expected latency and length, and leave the quality where it was."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    before = policy.decide([make_request(HARD)], {}, rng, 0)[0].estimate("large")
    for i in range(40):
        (decision,) = policy.decide(
            [make_request(HARD, Objective(models=("large",)))], {}, rng, i
        )
        policy.learn(decision, Outcome(decision.id, "ok", 0.4, 2.4, 20, 101))
    after = policy.decide([make_request(HARD)], {}, rng, 40)[0].estimate("large")
    assert after.unflawed_quality == pytest.approx(before.unflawed_quality)
    assert after.ttft_s == pytest.approx(0.4, rel=0.25)
    assert after.tpot_s == pytest.approx(0.02, rel=0.25)
    assert after.output_tokens == pytest.approx(101, rel=0.25)
    assert after.latency_s == pytest.approx(2.4, rel=0.35)


@pytest.mark.parametrize(("tokens", "limit"), [(300, 16), (1000, 400), (20, 50)])
def test_limits_of_some_clients_do_not_change_what_is_expected_for_others(
    tokens: int, limit: int
) -> None:
    """Most ask for less than the answer would be, or for more than a terse arm says: each is expected right."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    limited, free = (make_profile("Write an essay", limit=most) for most in (limit, 0))
    for i in range(500):
        profile = free if rng.random() < 0.2 else limited
        (decision,) = policy.decide(
            [Request("r", profile, Objective(models=("large",)))], {}, rng, i
        )
        length = int(tokens * np.exp(0.2 * rng.standard_normal()))
        cut = profile is limited and length > limit
        told = limit if cut else length
        policy.learn(
            decision,
            Outcome(
                "r", "ok", 0.4, 2.4, 20, told, finish_reason="length" if cut else "stop"
            ),
        )
    of_both = policy.decide(
        [Request("r", profile, Objective()) for profile in (limited, free)],
        {},
        rng,
        500,
    )
    expected = [decision.estimate("large").output_tokens for decision in of_both]
    assert expected[1] == pytest.approx(tokens, rel=0.1) and expected[
        0
    ] == pytest.approx(min(expected[1], limit))


def test_a_truncated_answer_longer_than_expected_is_learned() -> None:
    """If a limit truncates every answer, the arm is expected to use the whole limit."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    profile = make_profile("Sort these: 3 1 2", limit=200)
    for i in range(60):
        (decision,) = policy.decide(
            [Request("r", profile, Objective(models=("large",)))], {}, rng, i
        )
        policy.learn(
            decision, Outcome("r", "ok", 0.4, 2.4, 20, 200, finish_reason="length")
        )
    assert decision.estimate().output_tokens > 180


def test_answers_in_one_piece_teach_the_whole_latency() -> None:
    """Without a time to the first token the sum still comes out right."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    for i in range(60):
        (decision,) = policy.decide(
            [make_request(HARD, Objective(models=("large",)))], {}, rng, i
        )
        policy.learn(decision, Outcome(decision.id, "ok", 0.0, 2.4, 20, 101))
    assert policy.decide([make_request(HARD)], {}, rng, 60)[0].estimate(
        "large"
    ).latency_s == pytest.approx(2.4, rel=0.3)


def test_long_answers_in_one_piece_teach_little_about_the_first_token() -> None:
    """Most answers are long, the short ones show how the first token waits under load: both are expected right."""
    policy = make_policy("thompson", ARMS)
    rng = np.random.default_rng(0)
    wrong: dict[int, list[float]] = {5: [], 200: []}
    for i in range(1200):
        tokens = 200 if rng.random() < 0.7 else 5
        load = int(rng.choice([0, 2, 10, 30]))
        text = (
            "Tell me a long story about the king"
            if tokens == 200
            else f"What is {i} plus 3?"
        )
        forced = make_request(text, objective=Objective(models=("small",)))
        (decision,) = policy.decide(
            [forced], {"small": ModelState(in_flight=load)}, rng, i
        )
        takes_s = 0.04 * (1 + load) ** 0.9 + (tokens - 1) * 0.003 * (1 + load) ** 0.4
        policy.learn(
            decision,
            Outcome(
                decision.id,
                "ok",
                0.0,
                takes_s * np.exp(0.1 * rng.standard_normal()),
                20,
                tokens,
            ),
        )
        expected_s = (
            decision.estimate().ttft_s + (tokens - 1) * decision.estimate().tpot_s
        )
        wrong[tokens].append(abs(np.log(expected_s / takes_s)))
    assert np.mean(wrong[5][-150:]) < 0.1 and np.mean(wrong[200][-150:]) < 0.1


def test_limits_on_latency_and_cost_remove_arms_with_a_reason() -> None:
    """A deadline and a budget that only `small` can keep, and a limit that no arm can keep."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    play(policy, 200, 0)
    (late,) = policy.decide(
        [make_request(HARD, Objective(max_latency_s=0.3))], {}, rng, 200
    )
    (dear,) = policy.decide(
        [make_request(HARD, Objective(max_cost_usd=2e-4))], {}, rng, 200
    )
    (none,) = policy.decide(
        [make_request(HARD, Objective(max_latency_s=1e-4))], {}, rng, 200
    )
    assert late.arm == dear.arm == "small" and none.arm == ""
    assert Exclusion.of(late.estimate("large").removed_by) is Exclusion.LATENCY
    assert Exclusion.of(dear.estimate("large").removed_by) is Exclusion.COST


def test_an_answer_that_may_be_longer_than_the_context_has_room_for_goes_elsewhere() -> (
    None
):
    """If there is another with room; where there is none, the engine, which knows the tokens, has the last word."""
    policy = Thompson(
        [Arm("short", context_tokens=512), Arm("long", context_tokens=4096)]
    )
    profiles = [
        make_profile("Write.", tokens=300, limit=limit)
        for limit in (1000, 212, 0, 9000)
    ]
    requests = [
        Request(str(i), profile, Objective()) for i, profile in enumerate(profiles)
    ]
    requests.append(
        Request("by name", profiles[0], Objective(models=("short",)), forced=True)
    )
    made = policy.decide(requests, {}, np.random.default_rng(0), 0)
    excluded = [Exclusion.of(d.estimate("short").removed_by) for d in made]
    assert excluded == [Exclusion.CONTEXT, None, None, None, None]
    assert made[0].arm == "long" and made[3].arm and made[4].arm == "short"


def test_words_of_speed_and_accuracy_change_the_trade_off() -> None:
    """The same question prefers the fast arm when in a hurry and the accurate one when it must be right."""
    policy = Thompson(ARMS)
    play(policy, 300, 0)
    weights = Objective(latency_weight=0.6, cost_weight=3000)
    share = {}
    for words in ("Quick, urgent: ", "This must be right, be exact: "):
        rng = np.random.default_rng(0)
        asked = with_text_sensitivity([make_request(words + HARD, weights)])
        chosen = [policy.decide(asked, {}, rng, 300)[0].arm for _ in range(50)]
        share[words[:5]] = chosen.count("large") / 50
    assert share["This "] > share["Quick"]


def test_an_arm_that_fails_is_scored_as_worth_nothing() -> None:
    """Errors teach availability, a factor of the expected score; a client that leaves and a wrong request do not."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    (decision,) = policy.decide(
        [make_request(EASY, Objective(models=("large",)))], {}, rng, 0
    )
    for status in ("disconnected", "rejected"):
        policy.learn(decision, Outcome(decision.id, status))
    before = policy.decide([make_request(EASY)], {}, rng, 1)[0].estimate("large")
    assert before.quality == decision.estimate("large").quality
    for n in range(20):
        policy.learn(replaced(decision, n), Outcome(decision.id, "error"))
    after = policy.decide([make_request(EASY)], {}, rng, 1)[0].estimate("large")
    assert policy.state()["quality.count"][1] == 0
    assert after.quality < before.quality / 4
    assert after.unflawed_quality == pytest.approx(before.unflawed_quality)
    assert after.utility == pytest.approx(after.quality)


def replaced(decision: Decision, sequence: int) -> Decision:
    """The same decision, made later."""
    return structs.replace(decision, sequence=sequence)


def test_a_request_whose_answer_will_not_be_scored_gets_the_best_estimate() -> None:
    """Exploration teaches nothing there; where a score will come, both arms are tried."""
    policy = Thompson(ARMS)
    play(policy, 40, 0)
    rng = np.random.default_rng(1)
    request = replace(make_request(EASY), objective=Objective())
    shares = {}
    for chance in (0.0, 1.0):
        asked = [replace(request, score_chance=chance)] * 400
        made = policy.decide(asked, {}, rng, 40)
        chosen = np.array([decision.arm == "large" for decision in made])
        expected = np.mean([d.estimate("large").propensity for d in made])
        assert chosen.mean() == pytest.approx(expected, abs=0.08)
        shares[chance] = chosen.mean()
    best = max(made[0].estimates, key=lambda estimate: estimate.utility).arm
    assert shares[0.0] == pytest.approx(float(best == "large"), abs=0.05)
    assert 0.05 < shares[1.0] < 0.95


def test_numbers_that_are_not_finite_are_refused() -> None:
    """One NaN would make every later decision fail."""
    policy = Thompson(ARMS)
    (decision,) = policy.decide([make_request(EASY)], {}, np.random.default_rng(0), 0)
    with pytest.raises(ValueError, match="not finite"):
        policy.score(decision, float("nan"))
    features_with_nan = decision.profile.features.copy()
    features_with_nan[3] = np.nan
    with pytest.raises(ValueError, match="features that are not finite"):
        replace(decision.profile, features=features_with_nan)


def test_a_batch_decides_as_many_alone_would_on_average() -> None:
    """The estimates of a batch are those of its requests alone."""
    policy = Thompson(ARMS)
    play(policy, 100, 0)
    requests = [make_request(EASY), make_request(HARD), make_request("hello")]
    together = policy.decide(requests, {}, np.random.default_rng(0), 100)
    for request, decision in zip(requests, together, strict=True):
        (alone,) = policy.decide([request], {}, np.random.default_rng(0), 100)
        for arm in ("small", "large"):
            assert decision.estimate(arm).utility == pytest.approx(
                alone.estimate(arm).utility
            )
            assert decision.estimate(arm).propensity == pytest.approx(
                alone.estimate(arm).propensity
            )


def test_requests_of_one_batch_that_name_their_arm_count_as_load(
    arms: tuple[Arm, ...],
) -> None:
    """Thirty that all insist on `large` are as good as in flight for the one that is free to choose."""
    forced = [
        replace(make_request(objective=Objective(models=("large",))), forced=True)
        for _ in range(30)
    ]
    *_, free = Thompson(arms).decide(
        [*forced, make_request()], {}, np.random.default_rng(1), 0
    )
    assert free.estimate("large").load == 30 and free.estimate("small").load == 0
    (alone,) = Thompson(arms).decide([make_request()], {}, np.random.default_rng(1), 0)
    assert free.estimate("large").latency_s > 2 * alone.estimate("large").latency_s


def test_exploration_fades_with_the_scores() -> None:
    """After many scores the better arm is chosen more surely than by Thompson's own rule, from the same evidence."""
    sure, plain = (
        Thompson(ARMS, ThompsonSettings(fade=fade)) for fade in (10.0, float("inf"))
    )
    for policy in (sure, plain):
        rng = np.random.default_rng(4)
        for i in range(60):
            (decision,) = policy.decide(
                [make_request(EASY, Objective(models=(ARMS[i % 2].name,)))], {}, rng, i
            )
            policy.score(decision, float(rng.random() < (0.45, 0.55)[i % 2]))
    chances = [
        p.decide([make_request(EASY)], {}, rng, 60)[0].estimate("large").propensity
        for p in (sure, plain)
    ]
    assert abs(chances[0] - 0.5) > abs(chances[1] - 0.5)


def test_scores_of_keys_narrow_exploration_less_and_teach_as_much() -> None:
    """A key may give false scores, which only exploration corrects; withdrawn, they leave no trace."""
    rng = np.random.default_rng(3)
    anonymous, keyed = Thompson(ARMS), Thompson(ARMS)
    decisions = []
    for n in range(20):
        request = Request(str(n), make_profile(EASY if n % 2 else HARD), OBJECTIVE)
        (decided,) = anonymous.decide([request], {}, rng, n)
        of_key = decided.made(replace(request, owner="team"), "thompson-v0", 0.0)
        decisions.append(of_key)
        anonymous.score(decided, n % 3 / 2)
        keyed.score(of_key, n % 3 / 2)
    assert anonymous.quality.total_scores == pytest.approx([20, 20], rel=0.01)
    assert keyed.quality.total_scores == pytest.approx([8, 8], rel=0.01)
    assert keyed.quality.count.sum() == pytest.approx(20, rel=0.01)
    for n, decision in enumerate(decisions):
        keyed.score(decision, n % 3 / 2, weight=-1.0)
    assert keyed.quality.total_scores == pytest.approx([0, 0], abs=1e-9)
