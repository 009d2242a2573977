"""What the pages of the documentation say is true of the repository: settings, paths, alerts, and plain English."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from deployments.model_settings import ModelSettings
from deployments.operations.config_check import check_config
from deployments.settings import RENAMED, GatewaySettings, Tuning
from docs.reference.metrics_table import alerts
from tests.support.documents import ROOT, Block, Page, pages
from tests.test_layout import FORBIDDEN_WORDS

# the caption of a block of settings says where it belongs
SECTIONS: dict[str, type[BaseModel]] = {
    "args of the gateway": GatewaySettings,
    "user_config of the Ingress": Tuning,
}
MODELS = "models, in args of the gateway"
ROOMS = "deployments|policies|tests|benchmarks|notebooks|assets|deploy|docs"
PATH = re.compile(rf"(?<![\w/.-])(?:{ROOMS})/[\w./-]*\w")
FILE = re.compile(r"(?<![\w/.…<-])[\w.-]+\.(?:py|sh|cfg|ipynb|yaml|toml|lock)(?![\w/])")
MADE = {"docs/generated"}  # by a build
# code that is one word, or a word and its value, as in YAML
SETTING = re.compile(r"(?:\w+\.)?(\w+)(?:: .*)?")
# former names of settings that are the names of something else on a page
OTHER_THINGS = {("docs/guides/autoscaling.md", "requests")}  # of the router's state
# files that are made, or written by users
OF_USERS = {"grade.py"}


def settings_blocks() -> list[Any]:
    """All blocks of YAML, with their pages."""
    return [
        pytest.param(block, id=f"{page.name}: {block.text[:40]!r}")
        for page in pages()
        for block in page.blocks
        if block.language == "yaml"
    ]


@pytest.mark.parametrize("block", settings_blocks())
def test_settings_in_the_documentation_are_valid(block: Block) -> None:
    """A block of YAML is a valid part of serve_config.yaml; its caption says which part."""
    content = yaml.safe_load(block.text)
    if block.caption == MODELS:
        models = {"qwen3-4b": {}, "qwen3-14b": {}, **content}
        GatewaySettings.model_validate({"models": models})
        for model in content.values():
            ModelSettings.model_validate(model)
    elif block.caption in SECTIONS:
        section = SECTIONS[block.caption]
        needed: dict[str, object] = {}
        if section is GatewaySettings:
            needed = {"models": {"small": {}, "large": {}}}
        section.model_validate({**needed, **content})
    else:
        assert "applications" in content, f"{block.caption!r} is no section of settings"
        assert check_config(content) == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_settings_have_their_present_names(page: Page) -> None:
    """The text of a page names no setting by a name that the program refuses as renamed."""
    named = {found[1] for span in page.spans if (found := SETTING.fullmatch(span))}
    former = {old for _, old in RENAMED}
    assert not {
        name for name in named & former if (page.name, name) not in OTHER_THINGS
    }


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_json_and_python_in_the_documentation_are_valid(page: Page) -> None:
    """A block of JSON can be read, as a whole or line by line; a block of Python compiles."""
    for block in page.blocks:
        if block.language == "json":
            try:
                json.loads(block.text)
            except ValueError:
                for line in block.text.strip().split("\n"):
                    json.loads(line)
        if block.language == "python":
            compile(block.text, page.name, "exec")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_paths_in_the_documentation_exist(page: Page) -> None:
    """Each path of the repository, and each name of a file, is that of a file or folder."""
    missing = {
        path
        for path in PATH.findall(page.text)
        if path not in MADE
        and not (ROOT / path).exists()
        # a page of the documentation, as its neighbours name it
        and not (ROOT / "docs" / path).with_suffix(".md").exists()
    }
    names = {Path(name).name for name in tracked()}
    missing |= {
        name
        for name in FILE.findall(page.text)
        if name not in names and name not in OF_USERS
    }
    assert not missing


def tracked() -> list[str]:
    """The files of the repository, those not yet committed included."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:  # a copy without git
        return [str(path) for path in ROOT.rglob("*")]
    return result.stdout.split("\n")


def test_links_between_pages_that_only_a_repository_shows_exist() -> None:
    """Sphinx checks links inside docs/; README and the files beside it are checked here."""
    link = re.compile(r"\]\((?!https?:|#)([^)#]+)")
    missing = [
        f"{page.name}: {target}"
        for page in pages()
        if "/" not in page.name
        for target in link.findall(page.text)
        if not (ROOT / target).exists()
    ]
    assert not missing


def test_every_alert_has_a_section_in_the_runbook() -> None:
    """Each alert of deploy/prometheus/alerts.yml has a heading with its name, and steps to take."""
    text = (ROOT / "docs/operations/runbook.md").read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    headings = [section.split("\n", 1)[0] for section in sections]
    assert {rule["alert"] for rule in alerts()} <= set(headings)
    for section in sections:
        assert re.search(r"^1\. ", section, re.M), f"{section[:20]} has no steps"


def test_the_readme_is_short() -> None:
    """The README has at most 150 lines; everything else is in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_code_of_the_readme_is_in_plain_view() -> None:
    """The README shows the two commands, one request and one picture."""
    readme = (ROOT / "README.md").read_text()
    assert "make serve\nmake test" in readme
    assert readme.count("curl ") == 1 and readme.count("![") == 1


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_pages_avoid_forbidden_words(page: Page) -> None:
    """tests/words.txt holds for the documentation, too."""
    if page.name == "CODE_OF_CONDUCT.md":  # the text of the Contributor Covenant
        return
    assert not FORBIDDEN_WORDS.findall(page.text)


def test_an_invalid_setting_would_be_found() -> None:
    """The check of blocks refuses an unknown key."""
    block = Block("yaml", "args of the gateway", "journl: sqlite:///x.db")
    with pytest.raises(ValueError, match="journl"):
        test_settings_in_the_documentation_are_valid(block)
