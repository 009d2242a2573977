"""The wheel: what is in it, and that it works in an empty folder, outside of any checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"assets", "deployments", "policies"}
# prints where the package is, then what its parts find: the models, the embedder and the tokenizer
READS_BUNDLED_FILES = """
from pathlib import Path
from fastapi import FastAPI
from fastapi.testclient import TestClient
from deployments import paths
from deployments.app import with_source
from deployments.demonstration.run import make_stream
from deployments.documentation.page import add_docs_routes
from deployments.models.embedding_server import EmbeddingServer
from deployments.operations import launcher, weights
from deployments.profiler.reader import ProfileItem, TextProfiler
from deployments.settings import ProfilerSettings
print(paths.ROOT)
assert not paths.IS_CHECKOUT and paths.home() == Path.cwd()
cluster = launcher.load(paths.default_config(), paths.home() / "var", 0, without=["general"])
arguments = {a["name"]: a.get("args", {}) for a in cluster.config["applications"]}
source = with_source(arguments["nano"])["model_loading_config"]["model_source"]
hub = {"model_loading_config": {"model_source": "owner/model"}}
assert with_source(hub) == hub
assert Path(source, "model.safetensors").exists(), source
embedder = EmbeddingServer(**arguments["minilm"])
assert embedder._answer(["some words"], False)[1].prompt_tokens == 2
settings = arguments["gateway"]["profiler"]
item = ProfileItem("one two", "one two", 0, "chat", 0)
(profile,) = TextProfiler(ProfilerSettings(**settings)).profile([item])
assert profile.prompt_tokens > 2, "estimated, and not counted by the tokenizer"
item = ProfileItem("¿Cuánto es 12 más 8?", "", 0, "chat", 0)
(profile,) = TextProfiler(ProfilerSettings(**settings)).profile([item])
assert profile.kind == "arithmetic", "the classifier is bundled"
assert len(make_stream(1, 20, with_talk=True)) == 20
assert paths.fetched_roots()[-1] == Path.cwd() / "var/fetched"
assert "assets/models/general" in weights.MAKERS
app = FastAPI(docs_url=None)
add_docs_routes(app)
page = TestClient(app)
assert "start.js" in page.get("/docs").text and page.get("/docs/start.js").is_success
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "var", "build", "dist", "*_cache")
    shutil.copytree(ROOT, source, ignore=skip)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", str(source), "--no-deps"),
            *("--no-build-isolation", "--no-index", "-q", "-w", str(folder)),
            "--disable-pip-version-check",
        ],
        check=True,
        cwd=folder,
    )
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_has_the_product_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """It has deployments, policies and assets, and no tests, benchmarks, notebooks or documentation."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == SHIPPED


def test_the_wheel_has_every_module_and_what_the_commands_need(
    wheel: zipfile.ZipFile,
) -> None:
    """Every file of the three folders is there, unchanged: modules, and what is read at run time."""
    names = set(wheel.namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for house in SHIPPED
        for path in (ROOT / house).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"deployments/app.py", "deployments/documentation/page.html"} <= files
    assert {"assets/models/large/model.safetensors", "policies/py.typed"} <= files
    for name in sorted(files):
        assert name in names, f"{name} is not in the wheel"
        assert wheel.read(name) == (ROOT / name).read_bytes(), name
    mode = wheel.getinfo("deployments/operations/haproxy.sh").external_attr >> 16
    assert mode & 0o111  # HAProxy is started by it
    assert not {name for name in names if name.endswith((".png", ".pyc"))}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    """Name, version, licence, readme and the versions of Python are those of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (file,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(file).decode())
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert metadata["Requires-Python"] in (
        project["requires-python"],
        ",".join(reversed(project["requires-python"].split(","))),
    )
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_notice_says_where_all_data_come_from(wheel: zipfile.ZipFile) -> None:
    """Each folder and file of assets/ that is no code or configuration is in NOTICE, with its licence."""
    data = {
        "/".join(Path(name).parts[:2])
        for name in wheel.namelist()
        if name.startswith("assets/") and not name.endswith((".py", ".yaml"))
    }
    assert {"assets/embedder", "assets/models", "assets/prompts.jsonl"} <= data
    notice = (ROOT / "NOTICE").read_text()
    assert not {name for name in data if name not in notice}


class Installed:
    """The content of the wheel in a folder of its own, as pip installs it, and an empty folder to work in."""

    def __init__(self, wheel: zipfile.ZipFile, folder: Path):
        self.site = folder / "site"
        self.empty = folder / "empty"
        self.empty.mkdir()
        wheel.extractall(self.site)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the empty folder, with the package of the wheel."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.empty,
            env={
                **os.environ,
                "PYTHONPATH": str(self.site),
                "NUMBA_CACHE_DIR": str(self.site.parent / "numba"),
            },
            capture_output=True,
            text=True,
        )

    def router(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run the command `router`."""
        return self.python("-m", "deployments.commands", *line.split())


@pytest.fixture
def installed(wheel: zipfile.ZipFile, tmp_path: Path) -> Installed:
    return Installed(wheel, tmp_path)


@pytest.mark.slow
def test_an_installed_package_finds_its_models_from_any_folder(
    installed: Installed,
) -> None:
    """The bundled configuration is valid, and every path under assets/ in it is read."""
    done = installed.python("-c", READS_BUNDLED_FILES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed.site.resolve())]


@pytest.mark.slow
def test_the_first_commands_of_a_newcomer_without_a_checkout(
    installed: Installed,
) -> None:
    """`router init` writes the configuration once; the others take the folder's, and else the bundled one."""
    own = installed.empty / "serve_config.yaml"
    assert installed.router("check").stdout == "valid\n"
    absent = installed.router("check other.yaml")
    assert absent.returncode == 1 and "router init" in absent.stderr
    assert not list(installed.empty.iterdir())
    assert installed.router("init").returncode == 0
    assert own.read_bytes() == (ROOT / "serve_config.yaml").read_bytes()
    own.write_text("http_options: {}")
    again = installed.router("init")
    assert again.returncode == 1 and str(own) in again.stderr
    assert own.read_text() == "http_options: {}"
    (installed.empty / "var").mkdir()
    backup = installed.router("backup copy")
    assert backup.returncode == 1 and str(own) in backup.stderr


@pytest.mark.slow
def test_without_a_running_system_the_demo_says_so(installed: Installed) -> None:
    """It does not need a checkout; exit code 3 and one line."""
    done = installed.router("demo --url http://127.0.0.1:9")
    assert done.returncode == 3 and "router up" in done.stderr
    assert len(done.stderr.splitlines()) == 1
