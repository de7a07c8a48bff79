"""What the pages for contributors name exists, and the code that they show is the code."""

from __future__ import annotations

import re

import pytest

from tests.helpers import ROOT
from tests.test_workflows import why_not_make

PAGES = ("CONTRIBUTING.md", "docs/adding_an_operator.md", "docs/adding_a_model.md")
FOLDERS = "flamingo|flamingo_kernels|csrc|tests|benchmarks|docs|examples"
BLOCK = re.compile(r"^( *)```(?:py|cpp)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text()


def missing(text: str) -> list[str]:
    """Paths within backticks or quoted code that there are not; `<operator>` stands for one that there is."""
    named = re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w/.<>*-]+|\.github/\w+)", text)
    named = [name.rstrip(".").replace("<operator>", "gated_residual") for name in named]
    named = [re.sub("<(model|device)>", "*", name) for name in named]
    return [name for name in named if not [*ROOT.glob(name)]]


def excerpts(text: str) -> list[tuple[str, list[str]]]:
    """The file that a block of code names in its first line, and the parts that it shows of it."""
    found = []
    for indent, block in BLOCK.findall(text):
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        path = re.fullmatch(r"(?:#|//) ([\w/.]+)", lines[0])
        assert path, f"a block begins with the file that it is of, got {lines[0]!r}"
        found.append((path[1], "\n".join(lines[1:]).split("\n...\n")))
    return found


def lacking(path: str, parts: list[str]) -> list[str]:
    """The parts that are not in the file, line after line; within a list they are less indented."""
    whole = stripped((ROOT / path).read_text())
    return [part for part in parts if stripped(part) not in whole]


def stripped(text: str) -> str:
    return "\n".join(["", *(line.strip() for line in text.splitlines()), ""])


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    assert len(re.findall(rf"`(?:{FOLDERS})/", read(page))) > 3
    assert missing(read(page)) == []


@pytest.mark.parametrize("page", PAGES[1:])
def test_code_that_is_shown_is_in_its_file(page):
    found = excerpts(read(page))
    assert len(found) >= 5
    assert {path: lacking(path, parts) for path, parts in found if lacking(path, parts)} == {}


@pytest.mark.parametrize("page", PAGES)
def test_every_target_is_one_of_the_makefile(page):
    text = re.sub(r' ARGS=("[^"]*"|\S+)', "", read(page))
    commands = re.findall(r"(?:`|^ *|&& )(make [a-z][a-z-]*(?: [A-Z_]+=[\w.]+)*)", text, flags=re.MULTILINE)
    assert len(commands) > 2
    assert [reason for reason in map(why_not_make, commands) if reason] == []


def test_what_is_not_there_is_found():
    assert missing("`flamingo_kernels/mask.py`, `csrc/cpu/maks.h`. And tests/helpers/<operator>") == [
        "csrc/cpu/maks.h",
        "tests/helpers/gated_residual",
    ]
    ((path, parts),) = excerpts("```py\n# flamingo_kernels/mask.py\nimport math\n...\nimport maths\n```\n")
    assert lacking(path, parts) == ["import maths"]


def test_the_release_checks_what_the_workflows_do():
    releasing = read("CONTRIBUTING.md").partition("## Releasing\n")[2].partition("\n## ")[0]
    for target in (
        "lint",
        "test-slow",
        "test-newest",
        "docs",
        "test PYTHON=python3.10 TORCH=2.10.0",
        "wheel",
        "gpu",
    ):
        assert f"make {target}" in releasing
