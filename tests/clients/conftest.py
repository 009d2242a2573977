"""The system that the clients are tried against: `make test-clients URL=http://127.0.0.1:8000`.

The suite needs a running system and an environment of its own, so the ordinary test run leaves it out.
"""

import os

import pytest

from tests.support.skips import pytest_make_collect_report as pytest_make_collect_report
from tests.support.skips import pytest_runtest_makereport as pytest_runtest_makereport

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
