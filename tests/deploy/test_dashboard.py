"""Tests of deploy/grafana and deploy/prometheus: every query uses metrics that are exported, and returns data."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
import yaml
from msgspec import structs
from ray.dashboard.modules.metrics import metrics_head

from deployments.dispatch.admission import RANKS, ModelQueue
from deployments.dispatch.circuit_breaker import Breaker
from deployments.observability.gateway_metrics import (
    OTHER,
    PREFIXES,
    ROUTES,
    GatewayTelemetry,
    route_of,
)
from deployments.observability.metrics import (
    PairTelemetry,
    Telemetry,
    TrackerTelemetry,
)
from policies.demand import Demand
from policies.evaluation.kind_figures import Figures, FigureTable
from policies.events import ArmEstimate, Decision, Feedback, Outcome, Record
from policies.types import ModelState, Objective
from tests.support.balancer import free_port, within
from tests.support.debian import debian
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
ANNOTATIONS = [(mark["name"], mark["expr"]) for mark in BOARD["annotations"]["list"]]
QUERIES = TARGETS + ANNOTATIONS + [(rule["alert"], rule["expr"]) for rule in RULES]
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
    Telemetry(), PairTelemetry(), TrackerTelemetry(), GatewayTelemetry({}, {}, {})
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
    assert [v["name"] for v in BOARD["templating"]["list"]] == [
        "datasource",
        "mlflow",
        "ray",
    ]
    for link in BOARD["links"]:
        assert link["url"].partition("}")[0] in ("${mlflow", "${ray"), link["title"]


def test_the_label_of_a_route_is_one_of_a_fixed_list() -> None:
    """Clients choose paths; ids and unknown paths make no new label."""
    labels = {*ROUTES, *PREFIXES, OTHER}
    for path, label in (
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/feedback", "/v1/feedback"),
        ("/v1/router/state", "/v1/router/state"),
        ("/v1/router/decisions/dec-1", "/v1/router/decisions"),
        ("/v1/router/versions/3/evaluation", "/v1/router/versions"),
        ("/v1/models/Qwen/Qwen3-4B", "/v1/models"),
        ("/v1/models-of-mine", OTHER),
        ("/v1/chat/completions/", OTHER),
        ("/../../etc/passwd", OTHER),
    ):
        assert route_of(path) == label and label in labels


def test_the_dashboard_has_its_own_provider_folder() -> None:
    """Ray deletes the folder of its provider at each start; the uid of the data source is fixed."""
    provider, of_ray = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/router.yaml").read_text()
    )["providers"]
    assert (
        provider["options"]["path"] == "/etc/grafana/dashboards" and provider["folder"]
    )
    assert of_ray["folder"] == "Ray" != provider["folder"]
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["uid"] == "prometheus" and source["url"] == "$PROMETHEUS_URL"
    # the name by which Ray's own dashboards, and the panels in Ray's dashboard, find it
    assert source["name"] == metrics_head.DEFAULT_PROMETHEUS_NAME


def test_rays_own_dashboards_are_where_grafana_looks_for_them(tmp_path: Path) -> None:
    """The installed Ray writes them there, below the link `session_latest`, and names the data source by its type."""
    _, of_ray = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/router.yaml").read_text()
    )["providers"]
    session = tmp_path / "session_1"
    session.mkdir()
    (tmp_path / "session_latest").symlink_to(session)
    head = SimpleNamespace(
        _grafana_config_output_path=str(session / "metrics/grafana"),
        _grafana_session_latest_config_output_path=str(
            tmp_path / "session_latest/metrics/grafana"
        ),
        _grafana_dashboard_output_dir=str(session / "metrics/grafana/dashboards"),
        _prometheus_name=metrics_head.DEFAULT_PROMETHEUS_NAME,
        prometheus_host="http://127.0.0.1:9090",
        prometheus_headers={},
        _dashboard_uids={},
    )
    metrics_head.MetricsHead._create_default_grafana_configs(head)
    below = Path(of_ray["options"]["path"]).relative_to("/tmp/ray")
    written = [json.loads(file.read_text()) for file in (tmp_path / below).iterdir()]
    assert {board["uid"] for board in written} >= set(head._dashboard_uids.values())
    assert len(written) >= 5


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


@pytest.mark.slow
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
    telemetry: Telemetry,
    pairs: PairTelemetry,
    tracker: TrackerTelemetry,
    gateway: GatewayTelemetry,
) -> None:
    """Record half a second of good and bad traffic."""
    for path, code in (("/v1/chat/completions", 200), ("/v1/feedback", 503)):
        gateway.count(path, code)
    gateway.flush()
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
            outcome = Outcome("d", status, 0.1, 0.8, 20, 40, 1e-4)
            telemetry.observed([(decision, outcome)])
            best = ArmEstimate("small", utility=0.5)
            dear = ArmEstimate("large", utility=0.3, cost_usd=3e-4)
            routed = structs.replace(decision, arm="large", estimates=(best, dear))
            if fallback != "forced":
                telemetry.routed(routed, Record(routed))
                telemetry.routed(outcome, Record(routed, outcome))
            feedback = Feedback("d", 1.0)
            telemetry.score_counted(feedback, Record(decision, scores={"user": 1.0}))
            telemetry.scored("user", "duplicate")
    arms = ("small", "large")
    telemetry.configured(1_800_000_000.0)
    telemetry.live(
        {arm: ModelState(in_flight=2) for arm in arms},
        dict.fromkeys(arms, 0.5),
        dict.fromkeys(arms, 0.7),
        FigureTable(
            arms=dict.fromkeys(arms, FIGURES), kinds={"small": {"code": FIGURES}}
        ),
        {"reward": 0.6, "votes": 40.0, "regret": 0.01, "estimated_saving": 0.3},
    )
    warm = Demand(2.0, 1.5, 40.0, saved=0.7, balance=3.0)
    telemetry.demand(dict.fromkeys(arms, warm))
    telemetry.roles({"champion": (3, 0.8), "challenger": (4, 0.2)})
    telemetry.suspended(1, 2)
    telemetry.record_check(time.time(), 3, "thompson", 1, 0, 7)
    tracker.record_lag(12)
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
    gateway = GatewayTelemetry({"small": ModelQueue()}, {"small": Breaker()}, RANKS)
    turns = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal turns
            record_traffic(telemetry, pairs, tracker, gateway)
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


@pytest.mark.slow
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
    for name, expr in ANNOTATIONS:  # nothing has changed, so they mark nothing
        assert result(expr) == [], name
    loaded = httpx.get(prometheus + "/api/v1/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in loaded) == len(RULES)
