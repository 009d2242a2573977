"""Where the files of this installation and of an instance are, in a checkout and where the package is installed."""

from pathlib import Path

# the folder that has deployments/, policies/ and assets/: the checkout, or site-packages
ROOT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (ROOT / "serve_config.yaml").exists()
BUNDLED_CONFIG = ROOT / "assets/serve_config.yaml"
BUNDLED_GPU_CONFIG = ROOT / "assets/serve_config.gpu.yaml"


def home() -> Path:
    """The folder of an instance, to which relative paths in its configuration refer.

    It is the checkout. Of an installed package it is the current folder.
    """
    return ROOT if IS_CHECKOUT else Path.cwd()


def default_config() -> Path:
    """The instance's serve_config.yaml; the bundled one, if the folder has none."""
    own = home() / "serve_config.yaml"
    return own if own.exists() else BUNDLED_CONFIG


def bundled(path: str) -> str:
    """A path as it is, unless the current folder does not have it and this installation has.

    So `assets/models/nano` in a configuration means the bundled model wherever the package is installed. Of an
    installed package only assets/ counts: ROOT has other packages, too, and a path may be the name of a model hub.
    """
    own = Path(path)
    is_ours = IS_CHECKOUT or own.parts[:1] == ("assets",)
    if own.is_absolute() or own.exists() or not is_ours:
        return path
    shipped = ROOT / own
    return str(shipped) if shipped.exists() else path
