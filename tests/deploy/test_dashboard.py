"""Tests of deploy/grafana and deploy/prometheus: every query uses metrics that are exported, and returns data."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml

from deployments.observability.metrics import (
    PairTelemetry,
    Telemetry,
    TrackerTelemetry,
)
from policies.evaluation.kind_figures import Figures, FigureTable
from policies.events import Decision, Feedback, Outcome, Record
from policies.types import ModelState, Objective
from tests.support.balancer import debian, free_port, within
from tests.support.exposition import Metric, record
from tests.support.requests import make_profile

FIGURES = Figures(
    decisions=9,
    answers=8,
    availability=0.9,
    votes=5,
    score=0.8,
    score_low=0.4,
    score_high=0.95,
    arrived=8,
    latency_p50_s=0.2,
    latency_p95_s=0.7,
    tokens_per_s=30.0,
)
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana/dashboards/router.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())[
        "groups"
    ]
    for rule in group["rules"]
]
ALERT_TESTS = yaml.safe_load((DEPLOY / "prometheus/alerts.test.yml").read_text())[
    "tests"
]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [
    (panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]
]
QUERIES = TARGETS + [(rule["alert"], rule["expr"]) for rule in RULES]
# metrics that other programs export: HAProxy (tests/deploy/test_balancer.py checks these), Prometheus, and Ray Serve
# with its tags
OTHERS = {
    "up": {"job", "instance"},
    "haproxy_backend_active_servers": {"proxy"},
    "haproxy_server_status": {"proxy", "server", "state"},
    "ray_serve_num_http_requests_total": {
        "application",
        "status_code",
        "route",
        "method",
    },
    "ray_serve_num_http_error_requests_total": {
        "application",
        "error_code",
        "route",
        "method",
    },
    "ray_serve_deployment_queued_queries": {"application", "deployment"},
}


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> dict[str, Metric]:
    """The metrics of deployments/observability/metrics.py."""
    made = record(monkeypatch)
    Telemetry(), PairTelemetry(), TrackerTelemetry()
    return made


def asked(expr: str) -> set[str]:
    """Names of the metrics of a query."""
    without_strings = re.sub(r'"[^"]*"', "", expr)
    return set(re.findall(r"\b(?:ray|haproxy)_[a-z_]+\b|\bup\b", without_strings))


def labels(expr: str) -> set[str]:
    """The labels that a query selects or groups by."""
    matched = re.findall(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"', expr)
    grouped = ",".join(re.findall(r"(?:by|ignoring)\s*\(([^)]*)\)", expr))
    return {*matched, *(name.strip() for name in grouped.split(",") if name.strip())}


@pytest.mark.parametrize(("title", "expr"), QUERIES)
def test_queries_use_exported_metrics_and_labels(
    title: str, expr: str, metrics: dict[str, Metric]
) -> None:
    """Metrics have their exported names, and labels are tags of these metrics."""
    exported = {
        name: {*m.tags, "le"} for m in metrics.values() for name in m.exported()
    } | OTHERS
    assert asked(expr) and asked(expr) <= set(exported)
    assert labels(expr) <= set().union(*(exported[name] for name in asked(expr)))


def test_every_metric_is_used(metrics: dict[str, Metric]) -> None:
    """Every metric of the router is in a panel or an alert."""
    used = set().union(*(asked(expr) for _, expr in QUERIES))
    assert [m.name for m in metrics.values() if not m.exported() & used] == []


def test_ray_serve_exports_the_metrics_that_the_queries_use() -> None:
    """The names are in the source of Ray Serve."""
    folder = Path(ray.__file__).parent / "serve/_private"
    source = (folder / "request_ingress_metrics.py").read_text() + (
        folder / "router.py"
    ).read_text()
    for name in (
        'f"serve_num_{protocol_name}_requests"',
        'f"serve_num_{protocol_name}_error_requests"',
    ):
        assert name in source
    assert '"serve_deployment_queued_queries"' in source and '"error_code"' in source


def test_the_dashboard_is_well_formed() -> None:
    """Ids differ, panels do not overlap and fit the grid, each has a title, a unit and the chosen data source."""
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    assert [v["name"] for v in BOARD["templating"]["list"]] == ["datasource"]


def test_the_dashboard_has_its_own_provider_folder() -> None:
    """Ray deletes the folder of its provider at each start; the uid of the data source is fixed."""
    (provider,) = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/router.yaml").read_text()
    )["providers"]
    assert (
        provider["options"]["path"] == "/etc/grafana/dashboards" and provider["folder"]
    )
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["uid"] == "prometheus" and source["url"] == "$PROMETHEUS_URL"


def test_every_alert_has_a_severity_and_an_action() -> None:
    """Each alert is tested in a situation in which it fires and in one in which it does not."""
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]
        outcomes = {
            bool(case["exp_alerts"])
            for test in ALERT_TESTS
            for case in test["alert_rule_test"]
            if case["alertname"] == rule["alert"]
        }
        assert outcomes == {True, False}, rule["alert"]


def test_the_alerts_fire_when_they_must(tmp_path: Path) -> None:
    """Debian's promtool passes, and fails if one alert is broken."""
    debian("promtool", "prometheus")
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        (tmp_path / path.name).write_text(path.read_text())

    def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["promtool", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    for arguments in (
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts.test.yml"),
    ):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    alerts = tmp_path / "alerts.yml"
    alerts.write_text(
        alerts.read_text().replace("waiting_rows) > 1000", "waiting_rows) > 1000000")
    )
    assert promtool("test", "rules", "alerts.test.yml").returncode == 1


def record_traffic(
    telemetry: Telemetry, pairs: PairTelemetry, tracker: TrackerTelemetry
) -> None:
    """Record half a second of good and bad traffic."""
    for result in ("asked", "graded", "busy"):
        pairs.count(result)
    profile = make_profile()
    for arm, status, fallback in (
        ("small", "ok", ""),
        ("large", "ok", "forced"),
        ("large", "error", "router"),
        ("small", "ok", "profiler"),
        ("", "ok", ""),
    ):
        decision = Decision(
            "d", arm, 0, "thompson-v1", profile, Objective(), fallback=fallback
        )
        telemetry.decided([decision], 0.002)
        if arm:
            telemetry.observed(
                [(decision, Outcome("d", status, 0.1, 0.8, 20, 40, 1e-4))]
            )
            feedback = Feedback("d", 1.0)
            telemetry.score_counted(feedback, Record(decision, scores={"user": 1.0}))
            telemetry.scored("user", "duplicate")
    arms = ("small", "large")
    telemetry.live(
        {arm: ModelState(in_flight=2) for arm in arms},
        dict.fromkeys(arms, 0.5),
        dict.fromkeys(arms, 0.7),
        FigureTable(
            arms=dict.fromkeys(arms, FIGURES), kinds={"small": {"code": FIGURES}}
        ),
    )
    telemetry.record_check(time.time(), 3, "thompson", 1)
    tracker.record_export(time.time(), True)
    tracker.record_export(time.time(), False)


@pytest.fixture
def prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the metrics of a router under traffic."""
    program = debian("prometheus", "prometheus")
    made = record(monkeypatch)
    telemetry = Telemetry()
    pairs = PairTelemetry()
    tracker = TrackerTelemetry()
    turns = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal turns
            record_traffic(telemetry, pairs, tracker)
            turns += 1
            lines = [line for metric in made.values() for line in metric.lines()]
            for name, tags in OTHERS.items():
                values = {
                    "proxy": "gateways",
                    "application": "gateway",
                    "error_code": "500",
                    "state": "UP",
                }
                told = ",".join(
                    f'{tag}="{values.get(tag, "x")}"' for tag in sorted(tags)
                )
                lines += [f"{name}{{{told}}} {turns}"] if name != "up" else []
            body = ("\n".join(lines) + "\n").encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    targets = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
    scrape = {
        "job_name": "ray",
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "static_configs": targets,
    }
    config = {
        "rule_files": [str(DEPLOY / "prometheus/alerts.yml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    where = [
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        command = [program, f"--config.file={tmp_path / 'prometheus.yml'}", *where]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        server.shutdown()


def test_every_panel_has_data(prometheus: str) -> None:
    """A real Prometheus answers each of the dashboard's queries with finite numbers, and loads the alerts."""

    def result(expr: str) -> list[Any]:
        query = expr.replace("$__rate_interval", "60s")
        answer = httpx.get(prometheus + "/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def up() -> bool:
        try:
            return bool(result("sum(ray_router_outcomes_total) > 20"))
        # while Prometheus starts, it answers in plain text
        except (httpx.HTTPError, ValueError):
            return False

    within(60, up)

    def empty() -> list[str]:
        return [
            title
            for title, expr in TARGETS
            if not (found := result(expr)) or any(v != v for v in found)
        ]

    ends = time.monotonic() + 60
    while (silent := empty()) and time.monotonic() < ends:  # a rate needs two scrapes
        time.sleep(0.5)
    assert silent == []
    loaded = httpx.get(prometheus + "/api/v1/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in loaded) == len(RULES)
