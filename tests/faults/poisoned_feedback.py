"""Checks of learned state and statistics: kills, a refusing database, coverage, poisoning (see catalogue.py)."""

import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa

from benchmarks.statistics.offpolicy import coverage
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.reputation import KeyReputation
from policies.thompson.policy import Thompson
from policies.types import Arm, Vector
from tests.deployments.journal.test_durability import Kills, kill_often
from tests.faults.catalogue import ALONE, Fault, Finding
from tests.policies.thompson.test_propensity import asked, p_value, taught
from tests.support.gateway import Gateway, eventually
from tests.support.poisoning import ARMS, play

KILLS = 200
LOGS = 1_000
LENGTH = 400  # of T22
DECISIONS = 3_000
SEEDS = 20
KEYS = 20  # of T23


def t7(folder: Path) -> Finding:
    """Kill a process that learns 200 times while it works."""
    found: Kills = kill_often(f"sqlite:///{folder}/journal.db", folder, KILLS, 15)
    figure = f"{found.kills} kills, {found.interrupted} in mid-work: {found.lost} of {found.events} lost, "
    figure += f"{found.twice} counted twice, posterior {found.apart:.0e} apart"
    return Finding(
        figure,
        found.lost == found.twice == 0
        and found.apart <= 1e-9
        and found.interrupted > KILLS / 3,
    )


@contextmanager
def locked(gateway: Gateway, path: Path) -> Iterator[None]:
    """Hold the write lock of the journal's database, as another process could."""
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.rollback()


@contextmanager
def refusing(gateway: Gateway, pragma: str, normal: str) -> Iterator[None]:
    """Make SQLite refuse writes as on a full or a read-only disk, by a pragma; `normal` undoes it."""
    present = [pragma]

    def set_(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA {present[0]}")

    sa.event.listen(gateway.router.thing._journal.engine, "checkout", set_)
    yield
    present[0] = normal


def t8(folder: Path) -> Finding:
    """Lock the journal's database for some seconds; then let it be full, then read-only."""
    parts = []
    held = True
    troubles = {
        "locked": lambda gateway, path: locked(gateway, path),
        "full": lambda gateway, path: refusing(
            gateway, "max_page_count=1", "max_page_count=1073741823"
        ),
        "read-only": lambda gateway, path: refusing(
            gateway, "query_only=1", "query_only=0"
        ),
    }
    for name, trouble in troubles.items():
        (folder / name).mkdir()
        gateway = Gateway(folder / name)
        with gateway.client:
            before = [gateway.chat().headers["x-router-decision-id"] for _ in range(5)]
            eventually(
                lambda gateway=gateway: (
                    not gateway.ingress.router_client.outcomes.unsent
                )
            )
            journal = gateway.router.thing._journal
            statuses = Counter[int]()
            during = []
            with trouble(gateway, folder / name / "journal.db"):
                ends = time.monotonic() + (7 if name == "locked" else 4)
                while time.monotonic() < ends:
                    answer = gateway.chat()
                    statuses[answer.status_code] += 1
                    during.append(answer.headers["x-router-decision-id"])
                    time.sleep(0.1)
                score = gateway.client.post(
                    "/v1/feedback", json={"decision_id": before[0], "score": 1.0}
                )
                waiting = journal.waiting_rows
            began = time.monotonic()
            while (
                gateway.ingress.router_client.outcomes.unsent or journal.busy
            ) and time.monotonic() - began < 60:
                time.sleep(0.1)
            recovered_s = time.monotonic() - began
            kinds = Counter(
                type(event).__name__
                for found in journal.find_all(during).values()
                for event in found
            )
            again = gateway.client.post(
                "/v1/feedback", json={"decision_id": before[0], "score": 1.0}
            )
        retried = (
            score.status_code == 503
            and "retry-after" in score.headers
            and again.status_code == 200
        )
        lost = 2 * len(during) - kinds["Decision"] - kinds["Outcome"]
        held &= retried and set(statuses) == {200} and lost == 0
        parts.append(
            f"{name}: {statuses[200]} of {statuses.total()} answered, feedback {score.status_code}, "
            f"{waiting} rows waited, all there after {recovered_s:.1f} s, {lost} lost"
        )
    return Finding("; ".join(parts), held)


def t22(_: Path) -> Finding:
    """Measure the coverage of 95 % intervals on 1,000 logs, and test recorded propensities against choices."""
    every = coverage("clear", LOGS, LENGTH, seed=22)
    # targets that most logs refuse, because they are too short, have few estimates
    rows = [row for row in every if float(str(row["refused"])) < 0.5]
    targets = {row["target"] for row in rows}
    refused = {row["target"] for row in every} - {row["target"] for row in rows}
    shown = {
        "IPS, stabilised": "IPS",
        "DR, stabilised": "DR",
        "confidence sequence": "sequence",
        "IPS, uniform": "naive",
    }
    cover = {
        name: [float(str(row["cover"])) for row in rows if row["method"] == name]
        for name in shown
    }
    covered = {short: min(cover[name]) for name, short in shown.items()}
    rng = np.random.default_rng(22)
    cases = []
    sums = 0.0
    for k in (2, 3, 4):
        arms = tuple(
            Arm(f"arm{i}", prompt_price_usd=1e-6 * 2**i, output_price_usd=1e-6 * 2**i)
            for i in range(k)
        )
        policy, _narrower = taught(arms, 100)
        for request in asked(arms, policy, 100):
            decisions = policy.decide([request] * 1_000, {}, rng, 100)  # type: ignore[attr-defined]
            propensities = np.array([e.propensity for e in decisions[0].estimates])
            sums = max(sums, abs(propensities.sum() - 1))
            names = [arm.name for arm in arms]
            cases.append(
                (
                    np.bincount([names.index(d.arm) for d in decisions], minlength=k),
                    propensities,
                )
            )
    p = p_value(cases)
    worst = ", ".join(f"{name} {100 * share:.1f} %" for name, share in covered.items())
    figure = f"least of {len(targets)} targets: {worst} ({len(refused)} refused as unanswerable); "
    figure += f"choices against propensities p = {p:.2f}, sums 1 ± {sums:.0e}"
    noise = 100 * 3 * math.sqrt(0.95 * 0.05 / LOGS)
    honest = (
        all(93 - noise <= 100 * covered[name] <= 100 for name in ("IPS", "DR"))
        and covered["sequence"] >= 0.95
    )
    return Finding(figure, honest and p > 0.001 and sums < 1e-6)


class Run(NamedTuple):
    """A run of T23.

    regret, worst: mean regret, and share of the worst arm, over the requests of honest keys.
    hostile_share: share of the scores that came from hostile keys.
    found: for each quarantined hostile key the number of decisions until then.
    wronged: number of quarantined honest keys.
    """

    regret: float
    worst: float
    hostile_share: float
    found: list[int]
    wronged: int


def run_of(seed: int, hostile: int, pace: float, defended: bool) -> Run:
    """Play one run; called in another process."""
    played = play(seed, DECISIONS, KEYS, hostile, defended, pace)
    means = float(np.nanmean(played.regret)), float(np.nanmean(played.worst))
    return Run(*means, played.hostile, list(played.found.values()), len(played.wronged))


def t23(_: Path) -> Finding:
    """Let hostile keys score the best arm 0 and the worst arm 1, with and without the defence.

    Regret is the expected utility lost against the best arm, averaged over the requests of honest keys. It varies
    threefold between seeds, since too little exploration of one kind of prompt costs much. So the runs that are
    compared with the bar have five times as many seeds.
    """

    def runs_of(hostile: int, pace: float, defended: bool, seeds: int) -> list[Run]:
        return list(
            pool.map(
                run_of, range(seeds), repeat(hostile), repeat(pace), repeat(defended)
            )
        )

    def middle(runs: list[Run]) -> Vector:
        regret = np.array([run.regret for run in runs])
        return np.array([regret.mean(), np.median(regret)])

    def worst_share(runs: list[Run]) -> float:
        return 100 * float(np.mean([run.worst for run in runs]))

    parts = []
    held = True
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        clean = runs_of(0, 1.0, True, 5 * SEEDS)
        wronged = sum(run.wronged for run in clean)
        honest = len(clean) * KEYS
        for hostile, pace in ((1, 0.2), (1, 1.0), (2, 1.0), (4, 1.0)):
            runs = runs_of(hostile, pace, True, 5 * SEEDS if hostile == 2 else SEEDS)
            undefended = runs_of(hostile, pace, False, SEEDS)
            ratio = middle(runs) / middle(clean[: len(runs)])
            without = middle(undefended) / middle(clean[: len(undefended)])
            found = sorted(i for run in runs for i in run.found)
            worst = [worst_share(runs), worst_share(undefended)]
            wronged = wronged + sum(run.wronged for run in runs)
            honest = honest + len(runs) * (KEYS - hostile)
            if hostile == 2:
                held = bool((ratio <= 1.25).all())
            after = f"{found[len(found) // 2]}" if found else "never"
            share = 100 * np.mean([run.hostile_share for run in runs])
            parts.append(
                f"{share:.0f} % of the scores, {hostile} of {KEYS} keys, {len(runs)} seeds: mean {ratio[0]:.2f} × "
                f"(undefended {without[0]:.2f} ×), median {ratio[1]:.2f} × ({without[1]:.2f} ×), worst arm "
                f"{worst[0]:.1f} % ({worst[1]:.1f} %), {len(found)} of {len(runs) * hostile} found, median after "
                f"{after} decisions"
            )
    figure = f"regret beside clean at {'; '.join(parts)} (undefended: {SEEDS} seeds); "
    figure += f"honest keys quarantined: {wronged} of {honest}; "
    figure += f"clean {middle(clean)[0]:.4f} a request, worst arm {worst_share(clean):.1f} %; "
    events = play(0, DECISIONS, KEYS, 2, keep=True).events
    began = time.process_time()
    decision_records = DecisionRecords(reputation=KeyReputation())
    policy = Thompson(ARMS)
    for event in events:
        decision_records.apply(event, policy, fresh=True)
    figure += f"rebuilt from {len(events)} events in {time.process_time() - began:.1f} s of processor"
    return Finding(figure, held and wronged < 0.01 * honest)


FAULTS = [
    Fault("T7", "200 kills in mid-work", "0 lost, 0 twice, ≤ 1e-9", t7),
    Fault(
        "T8",
        "the journal's disk is locked, full, read-only",
        "100 % answered, 503 for feedback, 0 lost",
        t8,
    ),
    Fault("T22", "honest statistics", "≥ 93 %, sequence ≥ 95 %, p > 0.001", t22),
    Fault(
        "T23",
        "poisoned feedback",
        "≤ 1.25 × at 10 %, < 1 % wronged",
        t23,
        tier=ALONE,
    ),
]
