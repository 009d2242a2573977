"""Prometheus's text format of the product's own metrics, as Ray exports them, without Ray."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import pytest

from deployments.observability import gateway_metrics, metrics

Tags = tuple[tuple[str, str], ...]


class Metric:
    """A fake metric of ray.util.metrics with the same arguments and checks; it stores its values."""

    made: dict[str, "Metric"]
    kind = ""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()):
        self.name = f"ray_{name}"
        self.description = description
        self.tags = tag_keys
        self.values: dict[Tags, float] = defaultdict(float)
        type(self).made[self.name] = self

    def _key(self, tags: dict[str, str] | None) -> Tags:
        assert set(tags or {}) == set(self.tags), (
            f"{self.name} takes the tags {self.tags}, got {tags}"
        )
        return tuple(sorted((tags or {}).items()))

    def exported(self) -> set[str]:
        """Names of the metric in Prometheus. Ray adds _total to counters."""
        suffixes = {
            "counter": ("_total",),
            "gauge": ("",),
            "histogram": ("_bucket", "_sum", "_count"),
        }
        return {self.name + suffix for suffix in suffixes[self.kind]}

    def lines(self) -> list[str]:
        """Samples of the metric in Prometheus's text format."""
        (name,) = self.exported()
        return [f"{name}{_braces(key)} {value}" for key, value in self.values.items()]


class Counter(Metric):
    kind = "counter"

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.values[self._key(tags)] += value


class Gauge(Metric):
    kind = "gauge"

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        key = self._key(tags)
        if value is not None:  # as Ray does
            self.values[key] = value


class Histogram(Metric):
    kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str,
        boundaries: Sequence[float],
        tag_keys: tuple[str, ...] = (),
    ):
        super().__init__(name, description, tag_keys)
        self.bounds = boundaries
        self.counts = defaultdict[Tags, list[int]](lambda: [0] * (len(boundaries) + 1))

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        key = self._key(tags)
        self.values[key] += value
        self.counts[key][bisect_left(self.bounds, value)] += 1

    def lines(self) -> list[str]:
        found = []
        for key, counts in self.counts.items():
            for bound, up_to in zip(
                [*self.bounds, "+Inf"], accumulate(counts), strict=True
            ):
                found.append(
                    f"{self.name}_bucket{_braces((*key, ('le', str(bound))))} {up_to}"
                )
            found.append(f"{self.name}_sum{_braces(key)} {self.values[key]}")
            found.append(f"{self.name}_count{_braces(key)} {sum(counts)}")
        return found


def _braces(key: Tags) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in key) + "}"


def record(patch: pytest.MonkeyPatch) -> dict[str, Metric]:
    """Replace Ray's metrics by fake ones; returns those that are created from now on, by exported base name."""
    made: dict[str, Metric] = {}
    patch.setattr(Metric, "made", made, raising=False)
    for kind in (Counter, Gauge, Histogram):
        patch.setattr(metrics, kind.__name__, kind)
    for kind in (Counter, Gauge):
        patch.setattr(gateway_metrics, kind.__name__, kind)
    return made
