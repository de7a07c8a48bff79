"""The README and the pages of `docs/`: their code runs, their commands exist, and they print what is shown.

A block is read by its language:

python    runs, in the order of the page, with the names of the blocks before
text      right after such a block: what it prints
sh        commands that run: each ends without an error and prints something
others    their commands of this project are parsed, not run: they need what is not here, or minutes

A block whose first line is a comment with a file's name, as `# mine.py`, is that file. All of a page runs in
one folder, empty but for what `PREPARE` puts there.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import flamingo.__main__
import flamingo_kernels.__main__
from flamingo import Flamingo, save_model
from flamingo.training.config import tomllib
from flamingo_kernels._backends import env
from tests.helpers import ROOT

PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.\w+)\b")
COMMAND = re.compile(
    r"(?:^|\s)(?:python -m (flamingo\w*)|torchrun .*-m (flamingo)|(flamingo(?:-kernels)?))\s"
)


class Block(NamedTuple):
    """Attributes:
    language: what stands behind its fence.
    text: its lines.
    prints: the text block that comes right after it.
    """

    language: str
    text: str
    prints: str | None


def blocks(page: str) -> Iterator[Block]:
    text = PAGES[page].read_text()
    for block in BLOCK.finditer(text):
        after = BLOCK.match(text[block.end() :].lstrip("\n"))
        yield Block(block[1], block[2], after[2] if after and after[1] == "text" else None)


def runs(page: str) -> bool:
    return any(block.language in ("python", "sh") for block in blocks(page))


def digits(folder: Path) -> None:
    """What the demo leaves, but for its training."""
    pytest.importorskip("safetensors")
    pytest.importorskip("sklearn", reason="the demo's digits are scikit-learn's")
    from flamingo.demo.stages import CONFIG, make_processor

    save_model(Flamingo(CONFIG), make_processor(), folder / "digits.safetensors")


PREPARE: dict[str, Callable[[Path], None]] = {"asking": digits, "demo": digits, "evaluating": digits}
# Those that start processes, and a model of transformers with images of real size.
SLOW = ["README", *(page for page in PAGES if any(block.language == "sh" for block in blocks(page)))]
IMPORTED = re.compile(r"^ *(?:from|import) (PIL|transformers)\b", flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if runs(page)],
)
def test_it_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    for package in IMPORTED.findall("".join(block.text for block in blocks(page))):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    PREPARE.get(page, lambda folder: None)(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    before = set(sys.modules)
    try:
        for block in blocks(page):
            if file := FILE.match(block.text):
                Path(file[1]).write_text(block.text)
            if block.language == "python":
                capsys.readouterr()
                exec(compile(block.text, f"{page}.md", "exec"), names)
                if block.prints is not None:
                    assert capsys.readouterr().out == block.prints
            elif block.language == "sh":
                run(block.text)
    finally:
        for name in set(sys.modules) - before:
            if (origin := getattr(sys.modules[name], "__file__", None)) and tmp_path in Path(origin).parents:
                del sys.modules[name]


def run(text: str) -> None:
    """The commands of a block, by the shell and this Python."""
    text = re.sub(r"\bpython -m\b", f"{shlex.quote(sys.executable)} -m", text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-e", "-c", text], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip(), text


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """The package and the arguments of every command of this project that a page shows."""
    for block in blocks(page):
        if block.language in ("python", "text", "toml"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.partition(" | ")[0].partition(" > ")[0]
            if found := COMMAND.search(line):
                package = next(filter(None, found.groups())).replace("-", "_")
                yield package, shlex.split(line[found.end() :], comments=True)


COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "package", "arguments"),
    COMMANDS,
    ids=[f"{page}: {package} {' '.join(arguments)}" for page, package, arguments in COMMANDS],
)
def test_its_commands_are_understood(page, package, arguments, monkeypatch, capsys):
    main = {"flamingo": flamingo.__main__, "flamingo_kernels": flamingo_kernels.__main__}[package]
    monkeypatch.setattr(main, "run_command", lambda *_, **__: 0)
    try:
        status = main.main(arguments)
    except SystemExit as end:  # of --help and --version too
        status = end.code
    assert status == 0, capsys.readouterr().err


def test_every_target_of_make_is_one():
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE)}
    shown = "".join(block.text for page in PAGES for block in blocks(page))
    named = {*re.findall(r"^make ([\w-]+)", shown, flags=re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_every_extra_has_its_row():
    text = (ROOT / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    table = PAGES["getting_started"].read_text().partition("| extra | for |\n")[2].partition("\n\n")[0]
    assert {*re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)} == {*extras}


def read_by(path: Path) -> Iterator[str]:
    """The environment variables that a file reads or sets for itself, by its syntax."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[name, *_]):
                pass
            case ast.Call(func=ast.Name(id="_choice"), args=[name, *_]):
                pass
            case ast.Compare(left=name, comparators=[ast.Attribute(attr="environ")]):
                pass
            case _:
                continue
        name = constants.get(name.id, name) if isinstance(name, ast.Name) else name
        if isinstance(name, ast.Constant):
            yield name.value


def test_every_environment_variable_has_its_row():
    rows = [line for line in PAGES["environment"].read_text().splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall("`([A-Z_]+)`", row.split(" | ")[0])}
    folders = ("flamingo", "flamingo_kernels", "tests", "benchmarks", "examples")
    files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    everybodys = {"PATH", "PYTHONPATH"}
    read = {
        name for path in files if re.search(r"environ|_choice\(", path.read_text()) for name in read_by(path)
    }
    assert told == read - everybodys
    assert {*env.BACKENDS, *env.CPU_VARIANTS} <= {*re.findall("`(\\w+)`", "".join(rows))}
