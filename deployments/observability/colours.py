"""One colour for each model in every picture: the report, the demo, the benchmarks, calibrations and Grafana.

The default models always have the same colours: nano blue, small orange, large red. Other models get the colours of a
fixed palette, in the order of their prices and then of their names. The palette was searched for the largest distance
in CIELAB that people with any of the three colour vision deficiencies still see (the simulation is that of Machado,
Oliveira and Fernandes, IEEE TVCG 2009). tests/deployments/observability/test_colours.py computes the distances.
"""

from collections.abc import Mapping, Sequence
from math import inf

AUTO = "#111111"  # what the router chooses
STATIC = "#7f7f7f"  # static rules, and whatever is no model
MODELS: Mapping[str, str] = {"nano": "#0072b2", "small": "#e69f00", "large": "#b2182b"}
PALETTE = (
    *MODELS.values(),
    "#a6cee3",
    "#ddcc77",
    "#40004b",
    "#332288",
    "#56b4e9",
    "#882255",
)


def colours_of(
    names: Sequence[str], prices: Mapping[str, float] | None = None
) -> dict[str, str]:
    """The colour of each model, in the order of `names`.

    Args:
        names: the models.
        prices: of an output token, by model; models without a price come last.
    """
    found = {name: MODELS[name] for name in names if name in MODELS}
    free = [colour for colour in PALETTE if colour not in found.values()]
    known = prices or {}
    others = sorted(
        (name for name in names if name not in found),
        key=lambda name: (known.get(name, inf), name),
    )
    for n, name in enumerate(others):
        repeats, place = divmod(n, len(free))
        found[name] = _lighter(free[place], repeats)
    return {name: found[name] for name in names}


def _lighter(colour: str, times: int) -> str:
    """The colour, mixed with white so many times."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    for _ in range(times):
        parts = [round(part + (255 - part) * 0.4) for part in parts]
    return "#" + "".join(f"{part:02x}" for part in parts)
