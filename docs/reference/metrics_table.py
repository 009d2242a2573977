"""The tables of metrics and alerts, from the classes of deployments/observability/ and deploy/prometheus/alerts.yml."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import yaml

from deployments import observability
from docs.reference.markdown import table

ALERTS = Path(__file__).resolve().parents[2] / "deploy/prometheus/alerts.yml"
KINDS = ("Counter", "Gauge", "Histogram")
# what Prometheus fills in
LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")
VALUE = re.compile(r"\{\{ \$value[^}]*\}\}")


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
                VALUE.sub("…", LABEL.sub(r"*\1*", rule["annotations"]["summary"])),
            )
            for rule in alerts()
        ),
    )


def alerts() -> list[dict[str, Any]]:
    """The alerts of deploy/prometheus/alerts.yml."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def all_metrics() -> list[Metric]:
    """The metrics that the classes of deployments/observability/ make, by name."""
    found: dict[str, Metric] = {}
    for info in pkgutil.iter_modules(observability.__path__):
        module = import_module(f"{observability.__name__}.{info.name}")
        if not any(hasattr(module, kind) for kind in KINDS):
            continue
        with _recorded(module, found):
            for _, part in inspect.getmembers(module, inspect.isclass):
                if part.__module__ == module.__name__ and _has_metrics(part):
                    part(*(Mock() for _ in _required(part)))
    return [found[name] for name in sorted(found)]


def _has_metrics(part: type) -> bool:
    """Whether a class has a constructor of its own, which may make metrics; a protocol has none."""
    made = getattr(getattr(part, "__init__", None), "__code__", None)
    return made is not None and not getattr(part, "_is_protocol", False)


def _required(part: type) -> list[inspect.Parameter]:
    """The parameters of a constructor that have no default."""
    return [
        parameter
        for parameter in inspect.signature(part).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


@contextmanager
def _recorded(module: ModuleType, found: dict[str, Metric]) -> Iterator[None]:
    """Record the metrics that a module makes meanwhile, in place of making them."""

    def recorder(kind: str) -> Any:
        def make(
            name: str,
            description: str = "",
            boundaries: object = None,
            tag_keys: tuple[str, ...] = (),
        ) -> Mock:
            if kind != "Histogram":  # these have no boundaries
                tag_keys = boundaries or tag_keys  # type: ignore[assignment]
            suffix = "_total" if kind == "Counter" else ""
            shown = f"ray_{name}{suffix}"
            found[shown] = Metric(shown, kind, tuple(tag_keys), description)
            return Mock()

        return make

    used = [kind for kind in KINDS if hasattr(module, kind)]
    originals = {kind: getattr(module, kind) for kind in used}
    try:
        for kind in used:
            setattr(module, kind, recorder(kind))
        yield
    finally:
        for kind, original in originals.items():
            setattr(module, kind, original)
