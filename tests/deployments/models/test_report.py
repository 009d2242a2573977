"""The records that a model server reports with its answers."""

import pickle
import subprocess
import sys

import pytest

from deployments.models.report import ModelReport, failure


@pytest.mark.parametrize(
    "report", [ModelReport(7, 2, "stop"), failure("too long", 400, "messages")]
)
def test_a_report_survives_the_way_between_two_processes(report: ModelReport) -> None:
    """Ray sends it with pickle."""
    assert pickle.loads(pickle.dumps(report)) == report


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "invalid_request_error"), (500, "server_error")]
)
def test_an_error_has_the_shape_of_openai(status: int, kind: str) -> None:
    """All four keys, and the kind by who is at fault."""
    error = failure("try another", status, "model").error
    assert error is not None
    assert error.body() == {
        "error": {
            "message": "try another",
            "type": kind,
            "param": "model",
            "code": None,
        }
    }


def test_the_module_imports_neither_ray_nor_vllm() -> None:
    """The gateway imports it, and the gateway has no engine."""
    code = (
        "import sys, deployments.models.report\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"ray", "vllm", "torch", "fastapi"} & set(found.stdout.split())
