"""Serve's HAProxy and throughput mode: the addresses they listen at, and requests through them."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from deployments.access.api_keys import add
from deployments.operations import haproxy
from deployments.operations.launcher import ROOT, load

TEMPLATE = """frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind *:8000
    server a 127.0.0.1:30001 check
listen stats
  bind *:{stats}
"""


@pytest.mark.parametrize(
    ("gateway", "bound_to"),
    [
        ("", "*:8000"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("::1:8000", "::1:8000"),
        ("0.0.0.0:8000", "0.0.0.0:8000"),
    ],
)
def test_wrapper_binds_every_port_as_configured(
    tmp_path: Path, gateway: str, bound_to: str
) -> None:
    """Metrics and statistics are on loopback, the gateway at http_options.host, or at Serve's choice if empty."""
    variables = haproxy.environment(tmp_path, offset=70, gateway=gateway)
    config = tmp_path / "haproxy.cfg"
    config.write_text(TEMPLATE.format(metrics=9171, stats=8474))
    environment = {**os.environ, **variables, "ROUTER_HAPROXY": "echo"}
    started = subprocess.run(
        [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-sf", "7"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert started.stdout.split() == ["-db", "-f", str(config), "-sf", "7"]
    bound = [
        line.split()[1] for line in config.read_text().splitlines() if "bind" in line
    ]
    assert bound == ["127.0.0.1:9171", bound_to, "127.0.0.1:8474"]


def test_the_launcher_binds_the_gateway_to_the_configured_host(tmp_path: Path) -> None:
    """The host is that of the config, and the port is moved by the offset."""
    cluster = load(ROOT / "serve_config.yaml", tmp_path, offset=70)
    assert cluster.environment()["ROUTER_GATEWAY"] == "127.0.0.1:8070"
    cluster.config["http_options"]["host"] = "10.0.0.7"
    assert cluster.environment()["ROUTER_GATEWAY"] == "10.0.0.7:8070"


def test_serve_template_binds_as_the_wrapper_expects() -> None:
    """If a newer Serve wrote its bind lines otherwise, the wrapper would leave the ports open."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    binds = [
        line.strip()
        for line in HAPROXY_CONFIG_TEMPLATE.splitlines()
        if line.strip().startswith("bind ")
    ]
    assert (
        binds[0] == "bind :{{ config.metrics_port }}"
        and binds[-1] == "bind *:{{ config.stats_port }}"
    )
    assert all("frontend_host" in bind for bind in binds[1:-1])


def test_two_instances_share_no_port_and_no_file(tmp_path: Path) -> None:
    """The offset is that of the tests' own system."""
    here = haproxy.environment(tmp_path / "a", 0)
    there = haproxy.environment(tmp_path / "b", 100)
    # switches and code may be equal
    same = {
        key
        for key in here
        if here[key] == there[key] and not key.endswith(("_ENABLED", "_IMPORT_PATH"))
    }
    assert not {
        key
        for key in same
        if "PORT" in key or "SOCKET" in key or "FILE" in key or "STATE" in key
    }
    assert int(here["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"]) <= int(
        there["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"]
    )


def test_prepare_refuses_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    """Write access to the admin socket controls HAProxy."""
    haproxy.prepare(tmp_path)
    folder = Path(
        haproxy.environment(tmp_path, 0)["RAY_SERVE_HAPROXY_SOCKET_PATH"]
    ).parent
    assert len(str(folder)) <= 107 - len(".1234567.tmp") - len("/admin.sock") - 57
    folder.chmod(0o777)
    with pytest.raises(SystemExit, match="not a folder of this user alone"):
        haproxy.prepare(tmp_path)
    haproxy.remove(tmp_path)
    assert not folder.exists()


def test_launcher_option_keys_overrides_the_config(
    tmp_path: Path,
) -> None:
    """The file is merged into the settings of keys by its absolute path, and checked before the system starts."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    file = tmp_path / "own.json"
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=r"there is no API key in .*own\.json"):
        load(path, tmp_path, 0, file)
    add(file, "ann", ("infer",))
    relative = Path(os.path.relpath(file))
    for before in (None, {"file": "var/keys.json", "cross_check": False}):
        if before:
            config["applications"][-1]["args"]["keys"] = before
        path.write_text(yaml.safe_dump(config))
        loaded = load(path, tmp_path, 0, relative).config["applications"][-1]["args"][
            "keys"
        ]
        assert loaded == {**(before or {}), "file": str(file.resolve())}
    assert (
        "keys"
        not in load(ROOT / "serve_config.yaml", tmp_path, 0).config["applications"][-1][
            "args"
        ]
    )
    config["http_options"]["host"] = "0.0.0.0"  # allowed with keys
    path.write_text(yaml.safe_dump(config))
    assert load(path, tmp_path, 0, file)
