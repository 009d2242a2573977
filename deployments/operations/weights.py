"""Models whose weights are not part of the installation: how they are fetched, and what is started without them."""

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from assets import smollm2
from assets.smollm2 import WeightsError
from deployments.operations.config_check import Config
from deployments.paths import bundled, fetched_roots

# by the source that a configuration names: how the model is written into a folder
MAKERS: dict[str, Callable[[Path], None]] = {"assets/models/general": smollm2.make}


def fetch(source: str) -> Path:
    """The folder of a model that MAKERS can make; it is made if there is none. It appears as a whole, or not at all.

    Raises:
        WeightsError: the weights cannot be had, or no folder can be written.
    """
    if (found := Path(bundled(source))).exists():
        return found
    for root in fetched_roots():
        target = root / source
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        except OSError:
            continue
        try:
            MAKERS[source](scratch / "model")
            (scratch / "model").rename(target)
        except OSError as error:
            if not target.exists():  # otherwise another start was quicker
                raise WeightsError(f"cannot write {target}: {error.strerror}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target
    places = " or ".join(str(root) for root in fetched_roots())
    raise WeightsError(f"cannot write into {places}")


def sources(config: Config) -> dict[str, str]:
    """By application, the source of the model whose weights have to be fetched."""
    found = {}
    for application in config.get("applications") or ():
        arguments = application.get("args") or {}
        loading = arguments.get("model_loading_config") or {}
        if (source := loading.get("model_source")) in MAKERS:
            found[str(application.get("name"))] = str(source)
    return found


def with_weights(config: Config, say: Callable[[str], object]) -> Config:
    """The configuration with the models whose weights are here or can be fetched; `say` gets a sentence for each other.

    Args:
        config: unchecked.
        say: also gets a sentence before weights are fetched.
    """
    missing = []
    for name, source in sources(config).items():
        if not Path(bundled(source)).exists():
            say(f"fetching the weights of {name}, once")
        try:
            fetch(source)
        except WeightsError as error:
            missing.append(name)
            say(
                f"{error}; so {name} is left out, and the other models start. The next start tries again; "
                f"`--without {name}` does not try"
            )
    return without(config, missing)


def without(config: Config, names: Collection[str]) -> Config:
    """The configuration without the applications of these models, and without the models in the gateway.

    Raises:
        SystemExit: an application of this name serves no model.
    """
    if not names:
        return config
    reduced = copy.deepcopy(config)
    applications = reduced.get("applications") or []
    gateways = [
        application
        for application in applications
        if str(application.get("import_path")).endswith(":gateway")
    ]
    served = [a.get("name") for a in applications if a not in gateways]
    for name in names:
        if name not in served:
            raise SystemExit(
                f"there is no model '{name}' to leave out; choose from: {', '.join(map(str, served))}"
            )
    reduced["applications"] = [a for a in applications if a.get("name") not in names]
    for gateway in gateways:
        models = (gateway.get("args") or {}).get("models") or {}
        for name in names:
            models.pop(name, None)
    return reduced


if __name__ == "__main__":
    for wanted in MAKERS:
        try:
            print(fetch(wanted))
        except WeightsError as problem:
            sys.exit(str(problem))
