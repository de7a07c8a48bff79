"""The page "Evaluate on the paper's benchmarks": what it says of each, and its commands."""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from flamingo.__main__ import main
from flamingo.fewshot import command
from flamingo.fewshot.benchmarks import BENCHMARKS
from tests.flamingo.fewshot.test_command import StandIn
from tests.helpers import ROOT, published
from tests.helpers.wordnet import write_wordnet

PAGE = (ROOT / "docs/evaluating.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    shlex.split(line.partition(" -m flamingo ")[2])
    for language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", " ").splitlines()
]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    found = StandIn()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "prepare", found.prepare)
    monkeypatch.setattr(command, "evaluate", found.evaluate)
    monkeypatch.setattr(command.named, "find", lambda name, options, say: found.make)
    return found


def put(name: str, arguments: list[str]) -> None:
    """The files that a command names, as they are published."""
    files = getattr(published, name)(Path("published", name))
    for option, value in pairwise(arguments):
        key = option.removeprefix("--").removeprefix("support-").replace("-", "_")
        if key == "nltk_data":
            write_wordnet(Path(value))
        elif key in files and not Path(value).exists():
            copy = shutil.copytree if files[key].is_dir() else shutil.copy
            copy(files[key], value)


def test_there_is_a_command_for_each():
    assert {arguments[1] for arguments in COMMANDS} == {*BENCHMARKS} - {"vqa", "captions"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[1])
def test_its_commands_read_what_is_published(stand_in, arguments, monkeypatch):
    name = arguments[1]
    if name in ("nextqa", "okvqa"):
        monkeypatch.setattr(pytest.importorskip("nltk.data"), "path", [])
    if name in ("hatefulmemes", "rareact"):
        pytest.importorskip("sklearn")
    put(name, arguments)
    assert main(arguments) == 0
    assert stand_in.asked["queries"]
    assert bool(stand_in.asked["support"]) == (name != "rareact")


@pytest.mark.parametrize("name", sorted({*BENCHMARKS} - {"vqa", "captions"}))
def test_it_says_what_the_command_lists(name):
    benchmark = BENCHMARKS[name]
    assert f"```text\n{command.describe(name)}\n```" in PAGE
    asked = "candidates ranked" if benchmark.task.closed else "answers generated"
    assert f"| `{name}` | {benchmark.split} | {asked} | {benchmark.task.metric} |" in PAGE


def test_every_option_that_it_names_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    for name in BENCHMARKS:
        with pytest.raises(SystemExit):
            main(["evaluate", name, "--help"])
        said += capsys.readouterr().out
    named = {*re.findall(r"--[a-z][a-z-]+", PAGE)} - {"--nproc-per-node"}
    assert named <= {*re.findall(r"--[a-z][a-z-]+", said)}
    assert len(named) > 20
