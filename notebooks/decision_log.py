"""Loads the log that the notebook analyses: a journal by its URL, or the bundled log of a real `make demo`.

`python -m notebooks.decision_log sqlite:///var/journal.db --demo var/demo-seed1.parquet` makes a new bundle. A bundle
has the routed decisions with their outcomes and feedback, rounded, without ids, hashes or text, and what the demo
measured for every strategy on the same tasks.
"""

import argparse
import lzma
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pandas as pd
import yaml

from deployments.journal.codec import decode, encode
from deployments.journal.journal import Journal
from deployments.settings import GatewaySettings
from policies.base import Policy
from policies.baselines import Static
from policies.evaluation.kind_figures import SIZE, RecentFigures, Totals
from policies.events import NOT_ROUTED, Decision, Event, Outcome, Record
from policies.feedback.decision_records import (
    DecisionRecords,
    EventProjection,
    History,
)
from policies.feedback.reputation import KeyReputation
from policies.registry import make_policy
from policies.types import Arm

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "notebooks/demo_log.msgpack.xz"


class Counted:
    """The numbers of events in a log, and the figures of its latest decisions, as the router counts them.

    Args:
        size: number of decisions in the window of the figures.
    """

    def __init__(self, size: int = SIZE):
        self.totals = Totals()
        self.figures = RecentFigures(size)

    def record(self, event: Event, record: Record) -> None:
        """See EventProjection."""
        self.totals.add(event, record)
        self.figures.record(event, record)


@dataclass(frozen=True, eq=False)
class DecisionLog:
    """Decisions with their outcomes and scores.

    arms: the arms that may answer a chat, smallest first.
    events: all events in the order of the journal.
    records: the records of the routed decisions in the order of the journal. Several ingresses may give the same
        `sequence`, so it is not the order. Requests that name a model are among the events only.
    name: of the journal, for the report's headline.
    truth: one row for each strategy and task of a demo, with strategy, i, model, right, latency_s, cost_usd, utility;
        the tasks are in the order of the records. None for a log without such measurements.
    """

    arms: tuple[Arm, ...]
    events: list[Event]
    records: list[Record]
    truth: pd.DataFrame | None = None
    name: str = "a log without a name"

    @property
    def prices(self) -> dict[str, float]:
        """Prices of an output token by arm, for those that have one; the colours are in their order."""
        return {
            arm.name: arm.output_price_usd for arm in self.arms if arm.output_price_usd
        }

    @property
    def names(self) -> list[str]:
        """Names of the arms."""
        return [arm.name for arm in self.arms]

    def counted(self, size: int = SIZE) -> Counted:
        """The numbers and figures of all decisions, the forced ones included."""
        counted = Counted(size)
        records = _decision_records(counted)
        policy = Static(self.arms)
        for event in self.events:
            records.apply(event, policy)
        return counted

    def learned(self, upto: int | None = None, name: str = "thompson") -> Policy:
        """A policy that has learned from the log's first routed decisions.

        It learns all outcomes and scores of these decisions, however late, and those of the other decisions made
        before the last of them. Its clock stops at the last one.

        Args:
            upto: number of routed decisions; by default all.
            name: name of the policy.
        """
        decided = [event.id for event in self.events if isinstance(event, Decision)]
        if upto == 0:
            decided = []
        elif upto is not None:
            last = decided.index(self.records[upto - 1].decision.id)
            decided = decided[: last + 1]
        policy = make_policy(name, self.arms)
        records = _decision_records()
        kept = set(decided)
        for event in self.events:
            decision_id = event.id if isinstance(event, Decision) else event.decision_id
            if decision_id in kept:
                records.apply(event, policy)
                if isinstance(event, Decision):
                    policy.advance(event.sequence + 1)
        return policy


def _decision_records(projection: EventProjection | None = None) -> DecisionRecords:
    """Records for a whole log, with the rules of the router: an outcome may come before its decision, and scores of
    distrusted keys do not count.

    If the log begins later than the router did, the reputation of keys depends on the remaining events only.
    """
    return DecisionRecords(
        capacity=10**9,
        history=History(keeps_unknown=True),
        projection=projection,
        reputation=KeyReputation(),
    )


def journal_name(url: str) -> str:
    """The name of a journal in the report: the file of SQLite, or database and host; without folder and user."""
    parts = urlsplit(url)
    file = parts.path.rpartition("/")[2]
    if parts.scheme.startswith("sqlite"):
        return f"{file} (SQLite)"
    return f"{file} on {parts.hostname or 'this machine'} (PostgreSQL)"


def log_of(
    events: list[Event],
    arms: tuple[Arm, ...],
    truth: pd.DataFrame | None = None,
    name: str = "a log without a name",
) -> DecisionLog:
    """The log of a list of events."""
    all_records = _decision_records()
    names = {arm.name for arm in arms}
    # the reputation of keys is computed only if a policy learns; this one ignores what it learns
    policy = Static(arms)
    for event in events:
        all_records.apply(event, policy)
    decisions = [
        e
        for e in events
        if isinstance(e, Decision) and e.fallback not in NOT_ROUTED and e.arm in names
    ]
    records = [all_records.get(decision.id) for decision in decisions]
    kept = [record for record in records if record is not None]
    return DecisionLog(arms, events, kept, truth, name)


def arms_in(events: list[Event], configured: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """The arms that could have answered a chat, by the estimates of the decisions; those of the newest ones first.

    Only configured arms have prices.
    """
    chats = [
        e
        for e in events
        if isinstance(e, Decision)
        and e.fallback not in NOT_ROUTED
        and e.profile.task != "embed"
    ]
    could = {
        estimate.arm
        for decision in chats
        for estimate in decision.estimates
        if not estimate.removed_by
    }
    names = dict.fromkeys(
        e.arm
        for decision in reversed(chats)
        for e in decision.estimates
        if e.arm in could
    )
    known = {arm.name: arm for arm in configured}
    return tuple(known.get(name, Arm(name)) for name in names)


def load(where: str = "", config: str = "") -> DecisionLog:
    """Load the log of a journal, by default the bundled log.

    Args:
        where: URL of the journal, sqlite:///... or postgresql+psycopg://...
        config: the configuration file of the journal's system, for the arms' prices; by default serve_config.yaml.

    Raises:
        ValueError: the log has no routed decisions.
    """
    if where:
        applications = yaml.safe_load(
            (ROOT / (config or "serve_config.yaml")).read_text()
        )["applications"]
        gateway = next(a for a in applications if a["import_path"].endswith(":gateway"))
        events = [event for _, event in Journal(where).replay()]
        log = log_of(
            events,
            arms_in(events, GatewaySettings.model_validate(gateway["args"]).arms()),
            name=journal_name(where),
        )
    else:
        bundle = msgspec.msgpack.decode(lzma.decompress(BUNDLED.read_bytes()))
        truth = pd.DataFrame(bundle["truth"])
        log = log_of(
            [decode(*row) for row in bundle["events"]],
            msgspec.convert(bundle["arms"], tuple[Arm, ...]),
            truth,
            "the bundled log of `make demo` with seed 1",
        )
    if not log.records:
        raise ValueError(
            f"no routed decisions in {where or BUNDLED}; send some requests with `model: auto` first"
        )
    return log


def bundle(log: DecisionLog, truth: pd.DataFrame, path: Path = BUNDLED) -> None:
    """Write a log and the demo's measurements as a small bundle; see the module's docstring."""
    short = {record.decision.id: f"{n}" for n, record in enumerate(log.records)}
    events = []
    for event in log.events:
        if isinstance(event, Decision):
            if event.id in short:
                features = event.profile.features.astype(np.float16).astype(np.float64)
                estimates = tuple(
                    e._replace(
                        **{
                            k: float(np.float32(v))
                            for k, v in e._asdict().items()
                            if isinstance(v, float)
                        }
                    )
                    for e in event.estimates
                )
                profile = replace(event.profile, features=features, reasons=())
                mine = {
                    "id": short[event.id],
                    "profile": profile,
                    "estimates": estimates,
                }
                events.append(
                    msgspec.structs.replace(
                        event, **mine, prompt_hash="", prompt="", users=()
                    )
                )
        elif event.decision_id in short:
            about = short[event.decision_id]
            if isinstance(event, Outcome):
                events.append(
                    msgspec.structs.replace(event, decision_id=about, answer="")
                )
            else:
                events.append(replace(event, decision_id=about))
    columns = [
        "strategy",
        "i",
        "kind",
        "model",
        "right",
        "latency_s",
        "cost_usd",
        "utility",
    ]
    content = {
        "arms": log.arms,
        "events": [(type(event).__name__.lower(), encode(event)) for event in events],
        "truth": truth[columns].round(6).to_dict("list"),
    }
    path.write_bytes(lzma.compress(msgspec.msgpack.encode(content), preset=9))


def main() -> None:
    """Bundle the log of a journal, from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("journal", help="URL")
    parser.add_argument(
        "--demo",
        type=Path,
        required=True,
        help="what the demo measured, a parquet file",
    )
    parser.add_argument("--out", type=Path, default=BUNDLED)
    arguments = parser.parse_args()
    bundle(load(arguments.journal), pd.read_parquet(arguments.demo), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
