"""The tables of metrics and alerts, from deployments/observability/metrics.py and deploy/prometheus/alerts.yml."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.observability import metrics
from docs.reference.markdown import table

ALERTS = Path(__file__).resolve().parents[2] / "deploy/prometheus/alerts.yml"
KINDS = ("Counter", "Gauge", "Histogram")


@dataclass(frozen=True)
class Metric:
    """One metric, as Prometheus shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    description: str


def metrics_page() -> str:
    """A table of all metrics."""
    return table(
        ("metric", "kind", "labels", "meaning"),
        (
            (
                f"`{metric.name}`",
                metric.kind.lower(),
                ", ".join(f"`{label}`" for label in metric.labels),
                metric.description,
            )
            for metric in all_metrics()
        ),
    )


def alerts_page() -> str:
    """A table of all alerts."""
    return table(
        ("alert", "severity", "summary"),
        (
            (
                f"[{rule['alert']}](operations/runbook.md#{rule['alert'].lower()})",
                rule["labels"]["severity"],
                rule["annotations"]["summary"],
            )
            for rule in alerts()
        ),
    )


def alerts() -> list[dict[str, Any]]:
    """The alerts of deploy/prometheus/alerts.yml."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def all_metrics() -> list[Metric]:
    """The metrics that the classes of deployments/observability/metrics.py make, by name."""
    found: dict[str, Metric] = {}
    with _recorded(found):
        for _, part in inspect.getmembers(metrics, inspect.isclass):
            if part.__module__ == metrics.__name__ and _needs_nothing(part):
                part()
    return [found[name] for name in sorted(found)]


def _needs_nothing(part: type) -> bool:
    """Whether a class can be made without arguments."""
    return all(
        parameter.default is not parameter.empty
        for parameter in inspect.signature(part).parameters.values()
    )


@contextmanager
def _recorded(found: dict[str, Metric]) -> Iterator[None]:
    """Record the metrics that are made meanwhile, in place of making them."""

    def recorder(kind: str) -> Any:
        def make(
            name: str,
            description: str = "",
            boundaries: object = None,
            tag_keys: tuple[str, ...] = (),
        ) -> None:
            if kind != "Histogram":  # these have no boundaries
                tag_keys = boundaries or tag_keys  # type: ignore[assignment]
            suffix = "_total" if kind == "Counter" else ""
            shown = f"ray_{name}{suffix}"
            found[shown] = Metric(shown, kind, tuple(tag_keys), description)

        return make

    originals = {kind: getattr(metrics, kind) for kind in KINDS}
    try:
        for kind in KINDS:
            setattr(metrics, kind, recorder(kind))
        yield
    finally:
        for kind, original in originals.items():
            setattr(metrics, kind, original)
