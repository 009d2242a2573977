"""Clients on the command line: `llm` with its file of OpenAI-compatible models, and curl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BODY = {
    "model": "auto",
    "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
    "max_tokens": 4,
}


def run(*command: str, **extra: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **extra},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def llm_home(tmp_path: Path, url: str) -> str:
    """A folder of `llm` with the model file that its documentation describes."""
    models = f"- model_id: auto\n  model_name: auto\n  api_base: {url}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    return str(tmp_path)


def test_llm_prompt_stream_and_conversation(llm_home: str, key: str) -> None:
    command = [sys.executable, "-m", "llm", "-m", "auto", "--key", key]
    options = ["-o", "max_tokens", "8"]
    run(*command, *options, "--no-stream", "3 plus 5?", LLM_USER_PATH=llm_home)
    run(*command, *options, "3 plus 5?", LLM_USER_PATH=llm_home)
    run(*command, *options, "-c", "2 plus 2?", LLM_USER_PATH=llm_home)


def curl(url: str, key: str, *options: str) -> str:
    where = f"{url}/chat/completions"
    headers = [
        "-H",
        "content-type: application/json",
        "-H",
        f"authorization: Bearer {key}",
    ]
    return run("curl", "-sS", "--max-time", "60", *headers, *options, where)


def test_curl_whole_answer(url: str, key: str) -> None:
    for version in ("--http1.0", "--http1.1"):
        answer = json.loads(curl(url, key, version, "-d", json.dumps(BODY)))
        assert "content" in answer["choices"][0]["message"], version
        assert "logprobs" in answer["choices"][0]


def test_curl_stream(url: str, key: str) -> None:
    text = curl(url, key, "-N", "-d", json.dumps({**BODY, "stream": True}))
    assert text.startswith("data: ") and text.rstrip().endswith("data: [DONE]")


def test_curl_file_with_windows_line_ends(url: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_bytes(json.dumps(BODY, indent=1).replace("\n", "\r\n").encode())
    assert json.loads(curl(url, key, "--data-binary", f"@{path}"))["choices"]


def test_curl_retrieves_an_id_with_a_slash(url: str, key: str) -> None:
    for name in ("unknown/nothing", "unknown%2Fnothing"):
        answer = json.loads(
            run(
                "curl",
                "-sS",
                "-H",
                f"authorization: Bearer {key}",
                f"{url}/models/{name}",
            )
        )
        assert answer["error"]["code"] == "model_not_found"
