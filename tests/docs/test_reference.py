"""The generated reference has all of the code's settings, routes, errors and metrics."""

import re
from pathlib import Path

import pytest
from pydantic import Field

from deployments.model_settings import StrictModel
from deployments.settings import GatewaySettings, Tuning, _all_keys
from docs.reference import pages
from docs.reference.errors_table import error_codes
from docs.reference.metrics_table import all_metrics
from docs.reference.routes_table import openapi, routes_page
from docs.reference.settings_tables import meanings, sections, settings_page

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_is_in_the_reference_with_its_meaning() -> None:
    """All keys that serve_config.yaml may have are explained, each in the section to which it belongs."""
    models = dict(sections())
    found = {key for model in models.values() for key in model.model_fields}
    assert found == set(_all_keys())
    for model in models.values():
        assert set(meanings(model)) == set(model.model_fields), model.__name__
    page = settings_page()
    for key in found:
        assert f"| `{key}` |" in page


def test_a_row_has_type_bounds_and_default() -> None:
    """The table shows what the pydantic field declares."""
    page = settings_page()
    row = next(
        line for line in page.split("\n") if line.startswith("| `trace_sample_rate`")
    )
    assert "| number, at least 0, at most 1 | `0.02` |" in row
    assert GatewaySettings.model_fields["trace_sample_rate"].default == 0.02


def test_a_setting_without_a_meaning_stops_the_build() -> None:
    """The error names the class and the setting."""

    class Unexplained(StrictModel):
        """A section.

        explained: what it is.
        """

        explained: int = 1
        forgotten: float = Field(2.0, ge=0)

    assert meanings(Unexplained) == {"explained": "what it is."}
    with pytest.raises(ValueError, match="Unexplained does not explain: forgotten"):
        from docs.reference.settings_tables import _table

        _table(Unexplained)


def test_both_roots_of_the_settings_are_there() -> None:
    """`args` and `user_config` are the roots; their sections follow them."""
    named = [model for _, model in sections()]
    assert named[0] is GatewaySettings and Tuning in named


def test_every_route_is_in_the_reference() -> None:
    """The table has one row for each path and method of the OpenAPI schema."""
    page = routes_page()
    for path, methods in openapi()["paths"].items():
        for method in methods:
            shown = path.replace("{model:path}", "{model}")
            assert f"| `{method.upper()} {shown}` |" in page
    assert "| `functions` | not supported |" in page and "| null |" not in page


def test_the_error_codes_are_those_of_the_code() -> None:
    """Some codes whose status is known, in each of the ways in which the code makes an error."""
    codes = {(error.status, error.code) for error in error_codes()}
    assert {
        (401, "invalid_api_key"),
        (403, "insufficient_scope"),
        (404, "model_not_found"),
        (400, "context_length_exceeded"),
        (400, "unsupported_parameter"),
        (409, "no_answer"),
        (409, "gate_refused"),
        (409, "ancestor_of_champion"),
        (410, "feedback_expired"),
        (429, "rate_limit_exceeded"),
        (503, "model_unavailable"),
        (503, "too_many_unfinished"),
    } <= codes
    assert all(re.fullmatch(r"[a-z_]+", code) for _, code in codes)


def test_no_code_is_missing_from_the_reference() -> None:
    """Every word after `code=` in deployments/ is in the table."""
    codes = {error.code for error in error_codes()}
    for path in (ROOT / "deployments").rglob("*.py"):
        for code in re.findall(r'\bcode="([a-z_]+)"', path.read_text()):
            assert code in codes, f"{path.name}: {code}"


def test_the_metrics_are_those_of_the_alerts_and_the_dashboard() -> None:
    """Every metric of the router that an alert or a panel uses is in the table."""
    known = {metric.name for metric in all_metrics()}
    for file in ("prometheus/alerts.yml", "grafana/dashboards/router.json"):
        text = (ROOT / "deploy" / file).read_text()
        for name in set(re.findall(r"ray_router_[a-z_]+", text)):
            stem = re.sub(r"_(bucket|sum|count)$", "", name)
            assert stem in known, f"{file}: {name}"


def test_all_pages_are_written(tmp_path: Path) -> None:
    """A build writes one page for each generated table, and does not touch a page that has not changed."""
    pages.write(tmp_path)
    files = {file.stem: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert set(files) == set(pages.PAGES)
    pages.write(tmp_path)
    assert files == {f.stem: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
