"""Files that a host or a tool reads: forms for issues, workflows, citation, changes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sbert_fast

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*_*.yml"))
PAGES = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")]
PAGES += [ROOT / "benchmarks" / "README.md", ROOT / "docs" / "corpora.md"]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
ELEMENTS = {"checkboxes", "dropdown", "input", "markdown", "textarea"}


@pytest.mark.parametrize("path", FORMS, ids=[path.stem for path in FORMS])
def test_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "title", "labels", "body"}
    assert {element["type"] for element in form["body"]} <= ELEMENTS
    names = [element["id"] for element in form["body"]]
    assert len(set(names)) == len(names)
    labels = [element["attributes"]["label"] for element in form["body"]]
    assert len(set(labels)) == len(labels)
    assert any(element.get("validations", {}).get("required") for element in form["body"])


def test_there_is_a_form_for_each_kind() -> None:
    assert [path.stem for path in FORMS] == ["model_family", "slow_run", "wrong_vector"]


@pytest.mark.parametrize("path", [*FORMS, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_named_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "python benchmarks/" not in text
    for module in re.findall(r"python3? -m ((?:benchmarks|tools|sbert_fast)(?:\.\w+)*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or place.joinpath("__main__.py").is_file(), module
    for named in re.findall(r"(?:benchmarks|sbert_fast|tests|tools)/[\w/.]+\.(?:py|md)\b", text):
        assert ROOT.joinpath(named).is_file(), named


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflows(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)


def test_citation_is_of_this_version() -> None:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    citation = yaml.safe_load(ROOT.joinpath("CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == sbert_fast.__version__
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert all(author["name"] for author in citation["authors"])


def test_changelog_has_this_version() -> None:
    text = ROOT.joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE
    )
    versions = [version for version, _ in found]
    assert len(versions) == text.count("\n## ") and sbert_fast.__version__ in versions
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(numbers, reverse=True)
    kinds = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
