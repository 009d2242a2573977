"""The system that the clients are tried against: `make test-clients URL=http://127.0.0.1:8000`.

The suite needs a running system and an environment of its own, so the ordinary test run leaves it out. Models may
call no tools. So a second gateway, with an engine double, is started for the tests of whole tool calls.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.skips import pytest_make_collect_report as pytest_make_collect_report
from tests.support.skips import pytest_runtest_makereport as pytest_runtest_makereport

ROOT = Path(__file__).resolve().parents[2]
URL = os.environ.get("CLIENTS_URL", "").rstrip("/")
collect_ignore_glob = [] if URL else ["test_*.py"]
# clients that ask the net for prices or report their use would fail or wait where there is none
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}


@pytest.fixture(scope="session")
def url() -> str:
    """Base URL of the API, with /v1."""
    return f"{URL}/v1"


@pytest.fixture(scope="session")
def key() -> str:
    """An API key of the system; any text where it needs none."""
    return os.environ.get("CLIENTS_KEY", "none")


@pytest.fixture(scope="session")
def named() -> str:
    """A chat model of the system, by name; the first that is neither the router nor an embedding model."""
    if name := os.environ.get("CLIENTS_MODEL"):
        return name
    import openai

    client = openai.OpenAI(
        base_url=f"{URL}/v1", api_key=os.environ.get("CLIENTS_KEY", "none")
    )
    for model in client.models.list():
        if model.id.partition(":")[0] == "auto":
            continue
        try:
            client.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=1,
            )
        except openai.BadRequestError:
            continue
        return model.id
    raise RuntimeError("the system has no chat model")


@pytest.fixture(scope="session")
def tools_url() -> Iterator[str]:
    """Base URL, with /v1, of a gateway of which one model of three calls tools (tests/support/tool_gateway.py)."""
    command = [str(ROOT / ".venv/bin/python"), "-m", "tests.support.tool_gateway"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines = (line.strip() for line in process.stdout)
            address = next((line for line in lines if line.startswith("http")), None)
            assert address, "the gateway with tools ended before it answered"
            yield f"{address}/v1"
        finally:
            process.terminate()
