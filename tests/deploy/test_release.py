"""Tests of deploy/release.py."""

import re
from pathlib import Path

import pytest

from deploy import release

ROOT = Path(__file__).resolve().parents[2]


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
    # every process of Ray would import it, for 1.5 s
    assert "rfc3987-syntax" not in locked
    text = (ROOT / "requirements.tools.lock").read_text()
    assert text.count("==") <= text.count("--hash=sha256:")
