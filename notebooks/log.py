"""A log to look at: a journal by its URL, or the bundled one of a real `make demo`.

`python -m notebooks.log sqlite:///var/journal.db --demo var/demo-seed1.parquet` bundles one: the routed decisions with
their outcomes and feedback, rounded, without ids, hashes or any text; and what the demo measured of every strategy on
the same tasks.
"""

import argparse
import lzma
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import yaml

from deployments.codec import decode, encode
from deployments.journal import Journal
from deployments.settings import GatewaySettings
from policies.base import Policy
from policies.ledger import HELD, Event, Ledger, Record
from policies.registry import make_policy
from policies.static import Static
from policies.trust import Trust
from policies.types import FORCED, Arm, Decision, Outcome

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "notebooks/demo_log.msgpack.xz"


@dataclass(frozen=True, eq=False)
class DecisionLog:
    """What was decided and what came of it.

    arms: that may answer a chat, smallest first.
    events: in the order of the journal.
    records: of the routed decisions, in the same order, as several ingresses may give the same `sequence`; what clients
        forced is among the events only.
    truth: a row for each strategy and task of a demo: strategy, i, model, right, latency_s, cost_usd, utility; the
        tasks' order is that of the records. None where nobody measured.
    """

    arms: tuple[Arm, ...]
    events: list[Event]
    records: list[Record]
    truth: pd.DataFrame | None = None

    @property
    def names(self) -> list[str]:
        """Of the arms."""
        return [arm.name for arm in self.arms]

    @property
    def made(self) -> str:
        """When and by what it was decided: first and last day (UTC), first and last policy version."""
        ends = [record.decision for record in (self.records[0], self.records[-1])]
        days = dict.fromkeys(f"{datetime.fromtimestamp(decision.time_s, UTC):%Y-%m-%d}" for decision in ends)
        return f"{' to '.join(days)}, by {' to '.join(dict.fromkeys(decision.policy_version for decision in ends))}"

    def learned(self, upto: int | None = None, name: str = "thompson") -> Policy:
        """What a policy makes of the first so many routed decisions, by default of all, learned anew from the log.

        Of these, and of what was decided otherwise before the last of them, it is told all that came, however late;
        its clock stops there.
        """
        decided = [event.id for event in self.events if isinstance(event, Decision)]
        if upto is not None:
            decided = decided[: decided.index(self.records[upto - 1].decision.id) + 1] if upto else []
        policy, ledger, kept = make_policy(name, self.arms), _ledger(), set(decided)
        for event in self.events:
            if (event.id if isinstance(event, Decision) else event.decision_id) in kept:
                ledger.apply(event, policy)
                if isinstance(event, Decision):
                    policy.advance(event.sequence + 1)
        return policy


def _ledger() -> Ledger:
    """Of a whole log, as the router folds it: an outcome may stand before its decision, and not every key is trusted.

    If the log begins later than the router did, keys are judged by what is left.
    """
    return Ledger(capacity=10**9, absent=lambda _: HELD, trust=Trust())


def fold(events: list[Event], arms: tuple[Arm, ...], truth: pd.DataFrame | None = None) -> DecisionLog:
    """The log of these events."""
    ledger, names, nobody = _ledger(), {arm.name for arm in arms}, Static(arms)  # keys are judged only where one learns
    for event in events:
        ledger.apply(event, nobody)
    decisions = [e for e in events if isinstance(e, Decision) and e.fallback != FORCED and e.arm in names]
    records = [ledger.get(decision.id) for decision in decisions]
    return DecisionLog(arms, events, [record for record in records if record is not None], truth)


def arms_in(events: list[Event], configured: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """The arms that could have answered a chat, as the decisions' own estimates list them, today's first.

    What they cost is known of those only that are configured.
    """
    chats = [e for e in events if isinstance(e, Decision) and e.fallback != FORCED and e.profile.task != "embed"]
    could = {estimate.arm for decision in chats for estimate in decision.estimates if not estimate.removed_by}
    names = dict.fromkeys(e.arm for decision in reversed(chats) for e in decision.estimates if e.arm in could)
    known = {arm.name: arm for arm in configured}
    return tuple(known.get(name, Arm(name)) for name in names)


def load(where: str = "", config: str = "") -> DecisionLog:
    """The log of a journal (sqlite:///... or postgresql+psycopg://...), by default the bundled one.

    Args:
        where: URL of the journal.
        config: the file that its system was started with, for the arms' prices; by default serve_config.yaml.

    Raises:
        ValueError: there are no routed decisions in it.
    """
    if where:
        applications = yaml.safe_load((ROOT / (config or "serve_config.yaml")).read_text())["applications"]
        gateway = next(a for a in applications if a["import_path"].endswith(":gateway"))
        events = [event for _, event in Journal(where).replay()]
        log = fold(events, arms_in(events, GatewaySettings.model_validate(gateway["args"]).arms()))
    else:
        bundle = msgspec.msgpack.decode(lzma.decompress(BUNDLED.read_bytes()))
        truth = pd.DataFrame(bundle["truth"])
        log = fold([decode(*row) for row in bundle["events"]], msgspec.convert(bundle["arms"], tuple[Arm, ...]), truth)
    if not log.records:
        raise ValueError(f"no routed decisions in {where or BUNDLED}; send some requests with `model: auto` first")
    return log


def bundle(log: DecisionLog, truth: pd.DataFrame, path: Path = BUNDLED) -> None:
    """Write a log small: see the module's text."""
    short = {record.decision.id: f"{n}" for n, record in enumerate(log.records)}
    events = []
    for event in log.events:
        if isinstance(event, Decision):
            if event.id in short:
                features = event.profile.features.astype(np.float16).astype(np.float64)
                estimates = tuple(
                    e._replace(**{k: float(np.float32(v)) for k, v in e._asdict().items() if isinstance(v, float)})
                    for e in event.estimates
                )
                profile = replace(event.profile, features=features, reasons=())
                mine = {"id": short[event.id], "profile": profile, "estimates": estimates}
                events.append(msgspec.structs.replace(event, **mine, prompt_hash="", prompt=""))
        elif event.decision_id in short:
            about = short[event.decision_id]
            if isinstance(event, Outcome):
                events.append(msgspec.structs.replace(event, decision_id=about, answer=""))
            else:
                events.append(replace(event, decision_id=about))
    columns = ["strategy", "i", "kind", "model", "right", "latency_s", "cost_usd", "utility"]
    content = {
        "arms": log.arms,
        "events": [(type(event).__name__.lower(), encode(event)) for event in events],
        "truth": truth[columns].round(6).to_dict("list"),
    }
    path.write_bytes(lzma.compress(msgspec.msgpack.encode(content), preset=9))


def main() -> None:
    """Bundle a journal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", help="URL")
    parser.add_argument("--demo", type=Path, required=True, help="what the demo measured, a parquet file")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    arguments = parser.parse_args()
    bundle(load(arguments.journal), pd.read_parquet(arguments.demo), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
