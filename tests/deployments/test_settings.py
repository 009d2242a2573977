"""Settings hold no password: Ray's dashboard shows them, and the journal stores them."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments import app
from deployments.operations.config_check import check_config
from deployments.settings import GatewaySettings, JudgeSettings, encoded, latest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2"
POSTGRES = [
    f"postgresql+psycopg://user:{SECRET}@host/name",
    f"postgresql+psycopg://user:{SECRET}@host:5432/name?sslmode=require",
    f"postgresql+psycopg://:{SECRET}@/name",
    f"postgresql+psycopg:///name?user=a&password={SECRET}",
    f"postgresql+psycopg://host/name?sslpassword={SECRET}",
    f"postgresql+psycopg://user:{SECRET}@[host/name",
]
HTTP = [f"https://user:{SECRET}@mlflow:5000", f"http://:{SECRET}@mlflow"]
ALLOWED = [
    "sqlite:///var/journal.db",
    "sqlite:////tmp/a@b/journal.db",
    "postgresql+psycopg:///router",
    "postgresql+psycopg://user@host:5432/name?sslmode=require",
    "postgresql+psycopg:///router?host=/run/postgresql&passfile=/run/secrets/pgpass",
]


@pytest.mark.parametrize(
    ("key", "url"),
    [*(("journal", url) for url in POSTGRES), *(("mlflow_uri", url) for url in HTTP)],
)
def test_a_password_in_a_url_is_refused(key: str, url: str) -> None:
    """By the settings, by the check of a configuration and by the builder of the application; none repeats it."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    arguments = config["applications"][-1]["args"]
    arguments[key] = url
    with pytest.raises(ValidationError, match="holds a password"):
        GatewaySettings.model_validate(arguments)
    (problem,) = check_config(config)
    assert f".args: {key}: " in problem and "holds a password" in problem
    assert "PGPASSWORD" in problem and SECRET not in problem
    with pytest.raises(ValueError, match="holds a password") as raised:
        app.gateway(arguments)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("url", ALLOWED)
def test_a_url_without_a_password_is_allowed(url: str) -> None:
    given = {"models": {"a": {}}, "journal": url, "mlflow_uri": "http://mlflow:5000"}
    assert GatewaySettings.model_validate(given).journal == url


@pytest.mark.parametrize("url", ["https://a:b@judge/v1", "https://judge/v1?password=b"])
def test_a_judge_has_its_key_in_the_environment(url: str) -> None:
    with pytest.raises(ValidationError, match="key_env"):
        JudgeSettings(url=url)
    assert JudgeSettings(url="https://judge/v1").url


def test_settings_are_stored_without_the_journals_url() -> None:
    """They are read back with the URL that the process was given."""
    given = GatewaySettings.model_validate(
        {"models": {"a": {}}, "journal": "postgresql+psycopg://ann@host/name"}
    )
    stored = encoded(given)
    assert b"ann" not in stored
    elsewhere = given.model_copy(update={"journal": "sqlite:///other.db"})
    assert latest(stored, elsewhere) == elsewhere
    assert latest(stored, given) == given


def test_a_prior_by_kind_names_known_kinds() -> None:
    """An unknown kind is an error that lists the kinds; the arm gets the pairs."""
    model = {"prior_quality_by_kind": {"writing": 0.6}, "prior_scores": 4}
    settings = GatewaySettings.model_validate({"models": {"a": model}})
    (arm,) = settings.arms()
    assert (arm.prior_by_kind, arm.prior_scores) == ((("writing", 0.6),), 4.0)
    for bad, why in (({"poems": 0.6}, "unknown kind 'poems'"), ({"code": 2}, "code")):
        with pytest.raises(ValidationError, match=why):
            GatewaySettings.model_validate(
                {"models": {"a": {"prior_quality_by_kind": bad}}}
            )
