"""Budget pacing: the mean cost stays under the ceiling."""

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deployments.router.actor import Router
from policies.budget import MOST_BIAS, BudgetPacer, IngressPacer, Spending
from policies.events import CALIBRATION, FORCED, PAIR, ArmEstimate, Decision, Outcome
from policies.objectives import paced
from policies.types import Objective
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile, make_request

PROFILE = make_profile()


def spend(
    pacer: BudgetPacer,
    requests: int,
    seed: int,
    late: int = 0,
    batch: int = 1,
    tail: float = 0.5,
) -> list[float]:
    """Costs of requests that cost 0.1 or 1 unit of median, the dear answer being worth a random gain in score of up
    to 0.3 more. What they cost in fact differs from what was expected, and is known `late` requests later.
    """
    rng = np.random.default_rng(seed)
    unit = pacer.ceiling_usd
    costs = []
    pending: deque[tuple[Decision, Outcome]] = deque()
    weight = 0.0
    for n in range(requests):
        weight = pacer.cost_weight if n % batch == 0 else weight
        size = unit * np.exp(tail * rng.standard_normal())
        dear = 0.3 * rng.random() > weight * 1.8 * size
        expected = size * (2.0 if dear else 0.2)
        decision = Decision(
            str(n),
            "a",
            n,
            "",
            PROFILE,
            Objective(),
            (ArmEstimate("a", cost_usd=expected),),
        )
        pacer.decided(decision)
        costs.append(expected * np.exp(0.3 * rng.standard_normal()))
        pending.append((decision, Outcome(str(n), cost_usd=costs[-1])))
        while len(pending) > late:
            pacer.finished(*pending.popleft())
    while pending:
        pacer.finished(*pending.popleft())
    return costs


@pytest.mark.parametrize("ceiling", [1e-6, 1.0])
@pytest.mark.parametrize(
    ("late", "batch", "tail"), [(0, 1, 0.0), (0, 1, 1.0), (50, 1, 0.5), (20, 16, 0.5)]
)
def test_the_mean_ends_within_half_a_percent_under_the_ceiling(
    ceiling: float, late: int, batch: int, tail: float
) -> None:
    """At any scale of money, with sizes that scatter, late costs that were expected otherwise, and batches."""
    ends = [
        np.mean(spend(BudgetPacer(ceiling), 5000, seed, late, batch, tail)) / ceiling
        - 1
        for seed in range(4)
    ]
    assert np.mean(np.abs(ends)) < 0.005
    assert np.mean(ends) < (
        0.001 if late else 0
    )  # costs on their way are four percent higher than expected


@pytest.mark.parametrize(
    ("status", "fallback"), [("disconnected", ""), ("ok", "hedge"), ("ok", "model")]
)
def test_unreported_costs_are_charged(status: str, fallback: str) -> None:
    """Disconnected clients and second attempts add their expected cost, but no request and no credit."""
    pacer = BudgetPacer(1.0)
    for n in range(200):
        first, second = (
            Decision(
                f"{n}{why}",
                "a",
                n,
                "",
                PROFILE,
                Objective(),
                (ArmEstimate("a", cost_usd=0.4),),
                fallback=why,
            )
            for why in ("", fallback)
        )
        for decision in (first, second)[: 1 + bool(fallback)]:
            pacer.decided(decision)
            cost_usd = 0.4 if status == "ok" else 0.0
            pacer.finished(
                decision, Outcome(decision.id, status, latency_s=0.5, cost_usd=cost_usd)
            )
    assert pacer.requests == 200 and pacer.mean_cost_usd == pytest.approx(
        0.8 if fallback else 0.4
    )
    assert pacer.account == pytest.approx(200 * ((0.8 if fallback else 0.4) - 1.0))


def test_a_client_that_left_the_queue_costs_nothing() -> None:
    """No model was asked, so the expected cost is refunded."""
    pacer = BudgetPacer(1.0)
    for n in range(50):
        decision = Decision(
            str(n), "a", n, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=2.0),)
        )
        pacer.decided(decision)
        pacer.finished(
            decision, Outcome(decision.id, "disconnected", latency_s=3.0, waited_s=3.0)
        )
    assert pacer.spent_usd == pytest.approx(0.0) and pacer.account == pytest.approx(
        -50.0
    )


def test_the_scale_of_money_changes_nothing() -> None:
    """The same stream at a millionth of the prices is decided alike."""
    one, other = (
        np.array(spend(BudgetPacer(ceiling), 500, 3)) / ceiling
        for ceiling in (1e-6, 1.0)
    )
    assert one == pytest.approx(other)


def test_a_ceiling_that_does_not_bind_costs_nothing() -> None:
    """Without a ceiling the price is zero; with a loose one it falls to zero."""
    assert BudgetPacer().cost_weight == 0
    pacer = BudgetPacer(10.0)
    decision = Decision(
        "d", "a", 0, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=5.0),)
    )
    for _ in range(100):
        pacer.decided(decision)
    assert pacer.cost_weight == 0 and pacer.mean_cost_usd == 5.0
    for _ in range(10_000):
        pacer.decided(decision)
    assert pacer.account == -1000  # what is saved up is bounded


def test_it_comes_back_from_a_ceiling_that_could_not_be_kept() -> None:
    """While all is too dear it asks for the cheapest; afterwards the mean of the new stretch is at the ceiling."""
    pacer = BudgetPacer(1.0)
    decision = Decision(
        "d", "a", 0, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=1.5),)
    )
    for _ in range(400):
        pacer.decided(decision)
    assert pacer.cost_weight > 5
    spend(pacer, 4000, 1)
    assert np.mean(spend(pacer, 2000, 2)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("fallback", [FORCED, CALIBRATION])
def test_forced_requests_and_calibrations_do_not_count(fallback: str) -> None:
    """They do not change the account, and the price does not apply to forced requests."""
    pacer = BudgetPacer(1.0)
    decision = Decision(
        "d",
        "a",
        0,
        "",
        PROFILE,
        Objective(),
        (ArmEstimate("a", cost_usd=5.0),),
        fallback=fallback,
    )
    pacer.decided(decision)
    pacer.finished(decision, Outcome("d", cost_usd=7.0))
    assert (pacer.account, pacer.spent_usd, pacer.requests) == (0, 0, 0)
    forced = replace(make_request(objective=Objective(cost_weight=1.0)), forced=True)
    assert [
        r.objective.cost_weight
        for r in paced([forced, replace(forced, forced=False)], 2.0)
    ] == [1.0, 3.0]


@pytest.mark.parametrize("fallback", ["model", "hedge", PAIR])
def test_a_second_decision_adds_its_cost_and_no_request(fallback: str) -> None:
    """The ceiling is that of the request, whose answers it pays for."""
    pacer = BudgetPacer(1.0)
    first = Decision(
        "d", "a", 0, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=1.0),)
    )
    pacer.decided(first)
    pacer.finished(first, Outcome("d", cost_usd=1.0))
    second = structs.replace(first, id="e", fallback=fallback)
    pacer.decided(second)
    pacer.finished(second, Outcome("e", cost_usd=0.25))
    assert (pacer.requests, pacer.spent_usd) == (1, pytest.approx(1.25))
    assert pacer.account == pytest.approx(0.25)


def test_a_restored_pacer_goes_on() -> None:
    """Alike under the same ceiling; under another one with the same debt and price in US dollars."""
    pacer = BudgetPacer(2.0)
    spend(pacer, 300, 4)
    twin = BudgetPacer(2.0)
    other = BudgetPacer(3.0)
    twin.restore(pacer.state())
    assert twin.cost_weight == pacer.cost_weight and spend(twin, 50, 5) == spend(
        pacer, 50, 5
    )
    other.restore(pacer.state())
    assert other.account * 3.0 == pytest.approx(pacer.account * 2.0)
    assert other.cost_weight == pytest.approx(pacer.cost_weight)
    for broken in (
        {},
        pacer.state() | {"account": np.array([np.nan])},
        pacer.state() | {"scatter": np.zeros(2)},
    ):
        with pytest.raises(ValueError, match="pacer state"):
            BudgetPacer(2.0).restore(broken)


@pytest.mark.parametrize("debt", [-12.0, 0.0, 12.0, 500.0])
@pytest.mark.parametrize("ceiling", [0.5, 1.0, 8.0])
def test_another_ceiling_leaves_the_price_in_us_dollars(
    debt: float, ceiling: float
) -> None:
    """Whatever is owed or saved, the first request after a change of the ceiling is decided as the last before."""
    pacer = BudgetPacer(2.0)
    spend(pacer, 300, 4)
    pacer.account = debt
    changed = BudgetPacer(ceiling)
    changed.restore(pacer.state())
    assert pacer.cost_weight > 0
    assert changed.account * ceiling == pytest.approx(debt * 2.0)
    if debt * 2.0 / ceiling > -25.0:
        assert changed.cost_weight == pytest.approx(pacer.cost_weight)
    else:  # what is saved is worth many requests under the smaller ceiling
        assert changed.cost_weight == 0.0


@pytest.mark.parametrize("ceiling", [0.0, -1.0, float("nan")])
def test_a_ceiling_is_above_zero(ceiling: float) -> None:
    """An error names the value."""
    with pytest.raises(ValueError, match="choose one above zero"):
        BudgetPacer(ceiling)


async def test_the_router_paces_and_remembers(tmp_path: Path) -> None:
    """The price is in the logged objective of automatic requests only, and the account survives a restart."""
    gateway = Gateway(tmp_path)
    gateway.settings = gateway.settings.model_copy(update={"max_mean_cost_usd": 1e-6})
    gateway.router.thing = Router(gateway.settings, lambda _: gateway.replicas)
    with gateway.client:
        for _ in range(12):
            gateway.chat()
        gateway.chat(model="large")
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        found = gateway.chat().headers["x-router-decision-id"]
        objective = gateway.client.get(f"/v1/router/decisions/{found}").json()[
            "objective"
        ]
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        budget = gateway.client.get("/v1/router/state").json()["budget"]
    router = gateway.router.thing
    assert objective["cost_weight"] > 1e3 and budget["max_mean_cost_usd"] == 1e-6
    costs = [
        record.outcome.cost_usd
        for record in router._learner.records._records.values()
        if not record.decision.fallback
    ]
    assert len(costs) == 13 and budget["mean_cost_usd"] == pytest.approx(np.mean(costs))
    assert budget["account"] == pytest.approx(sum(cost / 1e-6 - 1 for cost in costs))
    replayed = Router(
        gateway.settings, lambda _: gateway.replicas
    )  # from the journal's rows
    kept = {
        name: float(value[0])
        for name, value in router._projections.pacer.state().items()
    }
    assert {
        name: float(value[0])
        for name, value in replayed._projections.pacer.state().items()
    } == pytest.approx(kept)

    router._journal.put_snapshot(router._learner.snapshot())
    await router._journal.flush()
    assert (
        Router(gateway.settings, lambda _: gateway.replicas)._projections.pacer.state()
        == kept
    )
    unpaced = Router(
        gateway.settings.model_copy(update={"max_mean_cost_usd": None}),
        lambda _: gateway.replicas,
    )
    assert (
        unpaced._projections.pacer.cost_weight == 0
        and unpaced._projections.pacer.mean_cost_usd == pytest.approx(np.mean(costs))
    )


def spend_at_ingresses(
    delay: int,
    seed: int,
    ingresses: int = 1,
    noise: float = 0.0,
    report: bool = True,
    bias: float = 1.0,
) -> tuple[float, float, list[float]]:
    """Mean cost in ceilings, mean score and price of 6,000 requests that ingresses decide on snapshots of the pacer.

    The router learns of a decision, and of what the answer cost in fact, `delay` requests later. `noise` is the
    deviation of the logarithm of that cost, and a dear answer costs `bias` times what is expected. Without `report` an
    ingress does not learn what the others have decided.
    """
    rng = np.random.default_rng(seed)
    ceiling = 2e-3
    router = BudgetPacer(ceiling)
    pacers = [IngressPacer(ceiling) for _ in range(ingresses)]
    under_way: deque[tuple[IngressPacer, Decision, float]] = deque()
    costs = []
    scores = []
    prices = []
    for n in range(6000):
        if n % (delay // 3 + 1) == 0:
            lacking = [pacer.undelivered for pacer in pacers]
            for i, pacer in enumerate(pacers):
                others = sum(lacking[:i] + lacking[i + 1 :], start=Spending())
                pacer.restore(
                    router.state(), ingresses, others if report else Spending()
                )
        here = pacers[int(rng.integers(ingresses))]
        price = here.cost_weight
        gain = 0.3 * rng.random()
        dear = gain > price * 1.8 * ceiling
        cost = ceiling * (2.0 if dear else 0.2)
        decision = Decision(
            str(n),
            "a",
            n,
            "",
            PROFILE,
            Objective(),
            (ArmEstimate("a", cost_usd=cost),),
            paced_weight=price,
        )
        here.decided(decision)
        paid = cost * float(np.exp(noise * rng.standard_normal() - noise**2 / 2))
        paid *= bias if dear else 1.0
        under_way.append((here, decision, paid))
        if len(under_way) > delay:
            ingress, first, cost_usd = under_way.popleft()
            router.decided(first)
            router.finished(first, Outcome(first.id, cost_usd=cost_usd))
            ingress.delivered(first)
        costs.append(paid / ceiling)
        scores.append(0.5 + gain if dear else 0.5)
        prices.append(price * ceiling)
    return float(np.mean(costs)), float(np.mean(scores)), prices


@pytest.mark.parametrize("ingresses", [1, 2, 4])
@pytest.mark.parametrize("delay", [10, 30, 100, 300])
def test_the_budget_is_kept_although_the_router_learns_of_decisions_late(
    delay: int, ingresses: int
) -> None:
    """The mean cost stays within 0.5 % of the ceiling, and no score is lost by the delay."""
    _, at_once, _ = spend_at_ingresses(0, 1)
    cost, score, _ = spend_at_ingresses(delay, 1, ingresses)
    assert 0.995 < cost < 1.005
    assert score > 0.98 * at_once


@pytest.mark.parametrize("delay", [100, 300])
def test_costs_that_nobody_expected_and_that_are_known_late_do_not_make_the_price_swing(
    delay: int,
) -> None:
    """The integral adds up the errors at the decisions, so debts that appear later move the price only once."""
    found = [spend_at_ingresses(delay, seed, 2, noise=1.0) for seed in range(4)]
    _, at_once, _ = spend_at_ingresses(0, 0, 2, noise=1.0)
    assert np.mean([score for _, score, _ in found]) > 0.98 * at_once
    assert abs(np.mean([cost for cost, _, _ in found]) - 1.0) < 0.01
    for _, _, prices in found:
        low, high = np.quantile(prices[1000:], (0.05, 0.95))
        assert (
            low > 0.01 and high < 20.0
        )  # from 0 to over 100 with an integral over late errors


@pytest.mark.parametrize("bias", [0.6, 1.6])
def test_answers_that_cost_more_or_less_than_expected_are_charged_so_before_they_arrive(
    bias: float,
) -> None:
    """The ratio of the answers that have arrived corrects those that have not; without it the mean is 2 % off."""
    _, at_once, _ = spend_at_ingresses(0, 1, bias=bias)
    cost, score, _ = spend_at_ingresses(300, 1, 2, bias=bias)
    assert 0.995 < cost < 1.005
    assert score > 0.98 * at_once


def test_a_lost_outcome_is_forgotten_and_the_ratio_is_bounded() -> None:
    """Outcomes that never come must not move the price for ever."""
    pacer = BudgetPacer(1.0)
    decision = Decision(
        "d", "a", 0, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=1.0),)
    )
    for _ in range(1000):
        pacer.decided(decision)
        pacer.finished(decision, Outcome("d", cost_usd=100.0))
    assert pacer.bias == MOST_BIAS
    assert pacer.pending == pytest.approx(0.0)
    for _ in range(100):
        pacer.decided(decision)
    assert 95.0 < pacer.pending <= 100.0
    for _ in range(30_000):
        pacer.charge(Spending(1.0, 0.0))
    assert pacer.pending < 0.5


def test_an_ingress_charges_what_the_router_lacks_of_the_others() -> None:
    """At the snapshot as they reported it; after it, as much as the ingress decides itself."""
    router = BudgetPacer(1.0)
    here = IngressPacer(1.0)
    here.restore(router.state(), 3, Spending(10.0, 15.0))
    charged = BudgetPacer(1.0)
    charged.restore(here._pacer.state())
    assert charged.account == pytest.approx(5.0)
    decision = Decision(
        "d", "a", 0, "", PROFILE, Objective(), (ArmEstimate("a", cost_usd=2.0),)
    )
    here.decided(decision)
    assert here._pacer.account == pytest.approx(5.0 + 3 * 1.0)
    assert here.undelivered == Spending(1.0, 2.0)
    here.restore(router.state(), 3, Spending(10.0, 15.0))
    assert here._pacer.account == pytest.approx(5.0 + 1.0)
    here.delivered(decision)
    assert here.undelivered == Spending()


@pytest.mark.parametrize(
    ("fallback", "charged"),
    [
        ("", Spending(1.0, 2.0)),
        ("hedge", Spending(0.0, 2.0)),
        (FORCED, Spending()),
        (CALIBRATION, Spending()),
    ],
)
def test_what_the_router_lacks_is_counted_as_the_router_will_count_it(
    fallback: str, charged: Spending
) -> None:
    """A second attempt is no request, and a choice of the client costs the budget nothing."""
    here = IngressPacer(1.0)
    here.decided(
        Decision(
            "d",
            "a",
            0,
            "",
            PROFILE,
            Objective(),
            (ArmEstimate("a", cost_usd=2.0),),
            fallback=fallback,
        )
    )
    assert here.undelivered == charged
    assert here._pacer.requests == charged.requests
    assert here._pacer.spent_usd == charged.cost_usd


def test_the_price_of_a_decision_is_recorded() -> None:
    """Zero without a price, and unknown for a request that named its model."""
    request = make_request(objective=Objective(cost_weight=1.0))
    forced = replace(request, forced=True)
    found = [r.paced_weight for r in paced([request, forced], 2.0)]
    assert found == [2.0, -1.0]
    assert paced([request], 0.0)[0].paced_weight == 0.0
