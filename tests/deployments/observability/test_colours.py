"""Each model has one colour in every picture, and the colours differ for all kinds of colour vision."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deployments.observability.colours import (
    AUTO,
    MODELS,
    PALETTE,
    STATIC,
    colours_of,
)

ROOT = Path(__file__).resolve().parents[3]
BOARD = ROOT / "deploy/grafana/dashboards/router.json"
# how colours look, by Machado, Oliveira and Fernandes (IEEE TVCG 2009), severity 1.0, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(colour: str, vision: str) -> NDArray[np.float64]:
    """CIELAB of a colour as it is seen."""
    part = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(VISION[vision] @ linear, 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_all_colours_differ_for_every_vision(vision: str) -> None:
    """By 15 in CIELAB for nine models, auto and the static rules; by 25 for the default models. 2.3 is just seen."""

    def least(colours: tuple[str, ...]) -> float:
        pairs = itertools.combinations([lab(c, vision) for c in colours], 2)
        return min(float(np.linalg.norm(a - b)) for a, b in pairs)

    assert least((*PALETTE, AUTO, STATIC)) > 15
    assert least((*MODELS.values(), AUTO, STATIC)) > 25


def test_the_default_models_keep_their_colours() -> None:
    """Blue, orange and red, whatever other models are there and in whatever order."""
    for names in (["nano", "small", "large"], ["x", "large", "nano", "small", "a"]):
        found = colours_of(names, {"x": 1.0})
        assert list(found) == names
        assert {name: found[name] for name in MODELS} == MODELS
        assert len(set(found.values())) == len(names)
    red, green, blue = (int(MODELS["nano"][at : at + 2], 16) for at in (1, 3, 5))
    assert blue > green > red
    red, green, blue = (int(MODELS["large"][at : at + 2], 16) for at in (1, 3, 5))
    assert red > 3 * max(green, blue)


def test_other_models_get_the_palette_by_price_and_name() -> None:
    """So a picture that lists them in another order has the same colours."""
    prices = {"c": 1.0, "a": 2.0}
    found = colours_of(["a", "b", "c"], prices)
    assert [found[name] for name in "cab"] == list(PALETTE[:3])
    assert colours_of(["c", "b", "a"], prices) == found
    many = colours_of([f"m{n:02d}" for n in range(25)])
    assert len(set(many.values())) == 25
    assert all(re.fullmatch(r"#[0-9a-f]{6}", colour) for colour in many.values())


PICTURES = (
    "notebooks/figures.py",
    "deployments/demonstration/run.py",
    "benchmarks/serving/plots.py",
    "deployments/tracking/calibration_report.py",
)


@pytest.mark.parametrize("path", PICTURES)
def test_pictures_of_models_take_their_colours_from_here(path: str) -> None:
    """No such file has a colour of its own for a model: no palette of matplotlib, no hexadecimal number of a model."""
    source = (ROOT / path).read_text()
    assert "from deployments.observability.colours import" in source
    assert "colours_of(" in source
    assert not re.search(r"f\"C\{|tab10|tab20b|prop_cycle|[\"']C\d[\"']", source)
    for colour in PALETTE:
        assert colour not in source.lower()


def test_grafana_has_the_same_colours_for_the_default_models() -> None:
    """Every panel with a line for each model has an override for each; the legend's text decides which lines."""
    panels = json.loads(BOARD.read_text())["panels"]
    seen = 0
    for panel in panels:
        legends = [t.get("legendFormat", "") for t in panel.get("targets", ())]
        if not any("{{arm}}" in legend for legend in legends):
            continue
        seen += 1
        overrides = panel["fieldConfig"]["overrides"]
        for name, colour in MODELS.items():
            fitting = [
                override
                for override in overrides
                if override["matcher"]["id"] == "byRegexp"
                and re.search(override["matcher"]["options"].strip("/"), name)
            ]
            assert len(fitting) == 1, (panel["title"], name)
            (found,) = [p for p in fitting[0]["properties"] if p["id"] == "color"]
            assert found["value"] == {"mode": "fixed", "fixedColor": colour}
            pattern = fitting[0]["matcher"]["options"].strip("/")
            for legend in legends:
                line = re.sub(r"\{\{(?!arm)\w+\}\}", "code", legend)
                shown = line.replace("{{arm}}", name)
                fits = re.search(pattern, shown) is not None
                assert fits == ("{{arm}}" in legend), (shown, pattern)
                for other in set(MODELS) - {name}:
                    assert not re.search(pattern, line.replace("{{arm}}", other))
    assert seen >= 12
