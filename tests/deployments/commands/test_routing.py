"""The commands on what the router decides: the explanation of a decision, and the first day."""

from typing import Any

import pytest

from tests.support.commands import data_of, invoke
from tests.support.gateway import Gateway, eventually


@pytest.fixture
def decision_id(gateway: Gateway) -> str:
    """Of a request that was answered."""
    found: str = gateway.chat().headers["x-router-decision-id"]
    path = f"/v1/router/decisions/{found}"
    eventually(lambda: gateway.client.get(path).json().get("outcome"))
    return found


def test_a_decision_is_explained(gateway: Gateway, decision_id: str) -> None:
    """The story is that of the gateway; the data has the numbers."""
    plain = data_of(gateway.client, f"explain {decision_id}")
    assert plain["decision_id"] == decision_id and len(plain["models"]) == 3
    result = invoke(gateway.client, f"explain {decision_id}")
    assert result.exit_code == 0 and result.stdout == f"{plain['summary']}\n"
    assert plain["model"] in result.stdout


@pytest.mark.parametrize("wrong", ["nothing", "a b", "%2e%2e", "é"])
def test_an_unknown_decision_is_refused(gateway: Gateway, wrong: str) -> None:
    """An id is one segment of the path, whatever it contains; another path is never asked."""
    result = invoke(gateway.client, "explain", wrong)
    assert result.exit_code == 1 and "unknown decision" in result.stderr
    assert result.stdout == ""
    result = invoke(gateway.client, "explain", "../state")
    assert result.exit_code == 1 and result.stdout == ""


def test_without_a_first_day_the_roles_are_shown(gateway: Gateway) -> None:
    """And there is no stage to begin."""
    result = invoke(gateway.client, "first-day status")
    assert "there is no first day" in result.stdout and "champion" in result.stdout
    plain: dict[str, Any] = data_of(gateway.client, "first-day status")
    assert plain["first_day"] is None
    assert plain["roles"]["champion"]["policy"] == "thompson"
    refused = invoke(gateway.client, "first-day advance")
    assert refused.exit_code == 1 and "start: observe" in refused.stderr
