"""The files of .github/ and CITATION.cff: what they name exists, and the steps are make targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import flamingo_kernels
from flamingo_kernels.__main__ import COMMANDS
from tests.helpers import ROOT

GITHUB = ROOT / ".github"
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = {"lint", "tests", "wheels", "docs"}
EXPRESSION = re.compile(r"\$\{\{ *([\w.]+) *\}\}")
COMMAND = re.compile(r"make ([a-z-]+)((?: [A-Z_]+=\S*)*)")


def read(path: Path) -> dict[str, Any]:
    """Every value as a text: `on` and `3.10` are no words to YAML."""
    content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    assert isinstance(content, dict)
    return content


def workflow(name: str) -> dict[str, Any]:
    return read(GITHUB / "workflows" / f"{name}.yml")


def why_not_make(command: str) -> str:
    """Why a step is no target of the Makefile with variables that the build reads, or an empty text."""
    found = COMMAND.fullmatch(EXPRESSION.sub("X", command))
    if not found:
        return "it is not one `make TARGET VARIABLE=value`"
    target, variables = found[1], re.findall(r" ([A-Z_]+)=", found[2])
    if not re.search(rf"^{target}:.* ## ", MAKEFILE, flags=re.MULTILINE):
        return f"the Makefile has no target {target}"
    unread = [name for name in variables if not re.search(rf"\$\(?(?:\$\{{)?{name}\b", MAKEFILE)]
    return f"the Makefile does not read {', '.join(unread)}" if unread else ""


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_there_are_these_and_no_others():
    assert {path.name for path in (GITHUB / "workflows").iterdir()} == {f"{name}.yml" for name in WORKFLOWS}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("make lint", ""),
        ("make test PYTHON=python${{ matrix.python }}", ""),
        ("make wheel FLAMINGO_KERNELS_BUILD=cuda", ""),
        ("make lnt", "no target lnt"),
        ("make build/x", "not one `make"),
        ("make lint && curl x", "not one `make"),
        ("make lint\nmake test", "not one `make"),
        ("pip install .", "not one `make"),
        ("make test PYTHN=x", "does not read PYTHN"),
    ],
)
def test_steps_of_other_kinds_are_found(command, reason):
    assert reason in why_not_make(command)
    assert bool(reason) == bool(why_not_make(command))


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_every_step_is_a_make_target_or_an_action_of_a_major_version(name):
    runs = [step["run"] for step in steps(name) if "run" in step]
    assert runs
    assert [reason for reason in map(why_not_make, runs) if reason] == []
    for step in steps(name):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_may_read_alone_and_ends_when_a_newer_one_begins(name):
    content = workflow(name)
    assert content["name"] == name
    assert content["permissions"] == {"contents": "read"}
    assert content["concurrency"]["cancel-in-progress"] == "true"
    assert "github.ref" in content["concurrency"]["group"]
    assert {"push", "pull_request"} <= set(content["on"])
    for job in content["jobs"].values():
        assert "permissions" not in job
        assert int(job["timeout-minutes"]) <= 120


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_every_job_checks_out_then_sets_up_python_with_a_cache(name):
    for job in workflow(name)["jobs"].values():
        checkout, python = job["steps"][:2]
        assert checkout["uses"].startswith("actions/checkout@")
        assert python["uses"].startswith("actions/setup-python@")
        assert python["with"]["cache"] == "pip"
        assert python["with"]["cache-dependency-path"].split() == ["constraints.txt", "pyproject.toml"]
        for path in python["with"]["cache-dependency-path"].split():
            assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_every_value_of_a_matrix_that_is_named_is_there(name):
    for job in workflow(name)["jobs"].values():
        named = {found for found in EXPRESSION.findall(str(job)) if found.startswith("matrix.")}
        matrix = job.get("strategy", {}).get("matrix", {})
        assert named == {f"matrix.{key}" for key in matrix.keys() - {"include", "exclude"}}


def test_the_tests_run_at_both_ends_and_in_between():
    (found,) = (job for job in workflow("tests")["jobs"].values() if "strategy" in job)
    matrix = found["strategy"]["matrix"]
    oldest_python = re.search(r'^requires-python = ">=([\d.]+)"', PYPROJECT, flags=re.MULTILINE)[1]
    oldest_torch = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    assert matrix["python"] == [oldest_python, "3.13"]
    assert matrix["torch"] == [f"{oldest_torch}.0", ""]
    assert matrix["include"] == [{"python": "3.11", "torch": ""}]
    (run,) = (step["run"] for step in found["steps"] if "run" in step)
    assert run == "make test PYTHON=python${{ matrix.python }} TORCH=${{ matrix.torch }}"
    assert "make test-newest" in [step.get("run") for step in steps("tests")]


def test_wheels_are_made_for_both_and_kept():
    runs = [step["run"] for step in steps("wheels") if "run" in step]
    assert runs == [f"make wheel FLAMINGO_KERNELS_BUILD={build}" for build in ("cpu", "cuda")]
    kept = [step["with"]["path"] for step in steps("wheels") if "upload-artifact" in step.get("uses", "")]
    assert kept == ["dist/*.whl"] * 2
    assert "--wheel-dir dist" in MAKEFILE


@pytest.mark.parametrize("name", ["bug", "model", "performance"])
def test_an_issue_form_asks_for_what_the_commands_say(name):
    form = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"]
    assert form["description"]
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert {each["type"] for each in form["body"]} <= {"markdown", "input", "textarea"}
    identities = [each["id"] for each in fields]
    assert len(set(identities)) == len(identities)
    assert all(each["attributes"]["label"] for each in fields)
    assert any(each.get("validations", {}).get("required") == "true" for each in fields)
    commands = re.findall(r"python -m flamingo_kernels (\w+)", str(form))
    assert set(commands) <= set(COMMANDS)
    asked = {"bug": {"info", "check"}, "model": set(), "performance": {"bench", "profile", "info"}}
    assert set(commands) == asked[name]
    assert [path for path in re.findall(r"docs/\w+\.md", str(form)) if not (ROOT / path).exists()] == []


def test_the_template_of_a_pull_request_names_targets():
    targets = re.findall(r"`(make [a-z-]+)`", (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text())
    assert targets
    assert [reason for reason in map(why_not_make, targets) if reason] == []


def test_the_citation_is_of_this_version():
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == flamingo_kernels.__version__
    assert f'license = "{cited["license"]}"' in PYPROJECT
    assert f'name = "{cited["title"]}"' in PYPROJECT
    assert cited["message"]
    assert cited["authors"] == [{"name": "The flamingo-kernels authors"}]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["identifiers"][0]["value"] == "arXiv:2204.14198"
    assert len(paper["authors"]) == 27
