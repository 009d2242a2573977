"""Version and files of this installation, and the files of an instance; for a checkout and for an installed package."""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

# the folder that has deployments/, policies/ and assets/: the checkout, or site-packages
ROOT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (ROOT / "serve_config.yaml").exists()
BUNDLED_CONFIG = ROOT / "assets/serve_config.yaml"
BUNDLED_GPU_CONFIG = ROOT / "assets/serve_config.gpu.yaml"


def release() -> str:
    """Version of the checkout, as its pyproject.toml says, or of the installed package."""
    if IS_CHECKOUT:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return str(project["version"])
    return version("adaptive-llm-router")


def home() -> Path:
    """The folder of an instance, to which relative paths in its configuration refer.

    It is the checkout. Of an installed package it is the current folder.
    """
    return ROOT if IS_CHECKOUT else Path.cwd()


def default_config() -> Path:
    """The instance's serve_config.yaml; the bundled one, if the folder has none."""
    own = home() / "serve_config.yaml"
    return own if own.exists() else BUNDLED_CONFIG


def fetched_roots() -> list[Path]:
    """Where weights are kept that are not part of this installation: in the virtual environment, or in the instance.

    The first one that can be written gets them (operations/weights.py).
    """
    in_environment = [Path(sys.prefix, "share/adaptive-llm-router")]
    return [
        *(in_environment if sys.prefix != sys.base_prefix else []),
        home() / "var/fetched",
    ]


def bundled(path: str) -> str:
    """A path as it is, unless the current folder does not have it and this installation has.

    So `assets/models/nano` in a configuration means the bundled model wherever the package is installed, and
    `assets/models/general` the fetched one. Of an installed package only assets/ counts: ROOT has other packages, too,
    and a path may be the name of a model hub.
    """
    own = Path(path)
    is_ours = IS_CHECKOUT or own.parts[:1] == ("assets",)
    if own.is_absolute() or own.exists() or not is_ours:
        return path
    places = [root / own for root in (ROOT, *fetched_roots())]
    return next((str(place) for place in places if place.exists()), path)
