"""Tests of deploy/release.py, and of the wheel that it builds."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from deploy import release

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"assets", "deployments", "policies"}


def write(folder: Path, version: str, changelog: str) -> None:
    """A project with nothing but a version and a changelog."""
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(changelog)


def test_a_version_needs_a_dated_section_in_the_changelog(tmp_path: Path) -> None:
    """'Unreleased' does not suffice."""
    write(tmp_path, "0.1.0", "## [Unreleased]\n")
    with pytest.raises(release.ReleaseError, match=r"\[0\.1\.0\] - YYYY-MM-DD"):
        release.version(tmp_path)
    write(tmp_path, "0.1.0", "## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n")
    assert release.version(tmp_path) == "0.1.0"


@pytest.mark.parametrize("version", ["1", "0.1", "01.0.0", "0.1.0-beta", "v0.1.0"])
def test_a_version_has_three_numbers(version: str, tmp_path: Path) -> None:
    """Other spellings are refused, with an example."""
    write(tmp_path, version, f"## [{version}] - 2026-12-01\n")
    with pytest.raises(release.ReleaseError, match="write it as"):
        release.version(tmp_path)


def test_the_steps_run_in_order_and_the_first_failure_ends_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tree is checked before anything is built."""
    ran = []

    def fail() -> None:
        """A step that fails."""
        raise release.ReleaseError("commit it")

    def note() -> None:
        """A step that is recorded."""
        ran.append("built")

    monkeypatch.setattr(
        release, "STEPS", {"version": note, "tree": fail, "wheel": note}
    )
    with pytest.raises(SystemExit, match="tree: commit it"):
        release.main([])
    assert ran == ["built"]
    release.main(["wheel"])
    assert ran == ["built", "built"]
    with pytest.raises(SystemExit):
        release.main(["publish"])
    assert "no step publish" in capsys.readouterr().err


def test_a_changed_file_stops_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file."""
    monkeypatch.setattr(release, "_output", lambda *_: " M README.md")
    with pytest.raises(release.ReleaseError, match=r"README\.md"):
        release.check_tree()


def pinned(name: str) -> dict[str, str]:
    """The versions in a requirements file, by normalised name."""
    lines = (ROOT / name).read_text().splitlines()
    parts = [line.rstrip("\\ ").partition("==") for line in lines if "==" in line]
    return {
        re.sub(r"[-_.]+", "-", package).lower(): version.partition(" ")[0]
        for package, _, version in parts
        if not package.startswith("#")
    }


def test_the_tools_have_hashes_and_agree_with_the_product() -> None:
    """Each tool is locked, and a package that the product has, too, has the product's version."""
    tools, locked = pinned("requirements.tools.txt"), pinned("requirements.tools.lock")
    assert tools and tools.items() <= locked.items()
    product = pinned("requirements.txt")
    shared = locked.keys() & product.keys()
    assert {name: locked[name] for name in shared} == {n: product[n] for n in shared}
    text = (ROOT / "requirements.tools.lock").read_text()
    assert text.count("==") <= text.count("--hash=sha256:")


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
    """All modules are there, and the files that are read at run time, unchanged."""
    names = set(wheel.namelist())
    modules = {
        path.relative_to(ROOT).as_posix()
        for house in SHIPPED
        for path in (ROOT / house).rglob("*.py")
    }
    assert modules <= names
    for name in (
        "deployments/py.typed",
        "policies/py.typed",
        "deployments/operations/haproxy.sh",
        "assets/prompts.jsonl",
        "assets/embedder/model.safetensors",
        "assets/embedder/tokenizer.json",
        "assets/models/large/model.safetensors",
        "assets/models/nano/tokenizer.json",
        "assets/models/small/chat_template.jinja",
    ):
        assert wheel.read(name) == (ROOT / name).read_bytes(), name
    assert (
        wheel.read("assets/serve_config.yaml")
        == (ROOT / "serve_config.yaml").read_bytes()
    )
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
