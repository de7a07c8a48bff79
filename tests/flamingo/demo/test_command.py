"""`python -m flamingo demo`: options, mistakes told before the work, and (slow) that it learns in context."""

import json
import os
import sys

import pytest
import torch

from flamingo.__main__ import main as flamingo_command
from flamingo.demo import command, lessons, run
from flamingo.demo.findings import Findings

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("matplotlib", reason="it draws")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_options(monkeypatch):
    calls = []
    monkeypatch.setattr("flamingo.demo.main", lambda *args, **options: calls.append((args, options)) or 3)
    more = "--picture x.png --model x.safetensors --json x.json --seed 4 --threads 2 --no-kernels --quick"
    assert flamingo_command(["demo"]) == flamingo_command(["demo", *more.split()]) == 3
    assert calls == [
        (
            ("digits.png", "digits.safetensors"),
            {"json": None, "seed": 0, "threads": 1, "kernels": True, "quick": False},
        ),
        (
            ("x.png", "x.safetensors"),
            {"json": "x.json", "seed": 4, "threads": 2, "kernels": False, "quick": True},
        ),
    ]


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """What is said on one line of stderr, by exit status 2, before any work, and with no file left."""
    (folder / "folder").mkdir()
    monkeypatch.setattr(command, "run", lambda **options: pytest.fail("the work has begun"))

    def refused(arguments=""):
        assert flamingo_command(["demo", *arguments.split()]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert os.listdir() == ["folder"]
        return said.err

    return refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--threads 0", "demo: expected --threads from 1 to "),
        ("--threads 1000000", "demo: expected --threads from 1 to "),
        ("--seed -1", "demo: expected --seed from 0 to 2**64 - 1, got -1."),
        (f"--seed {2**64}", "demo: expected --seed from 0 to 2**64 - 1, got "),
        ("--json none/x.json", "demo: none/x.json: No such file or directory\n"),
        ("--picture none/x.png", "demo: none/x.png: No such file or directory\n"),
        ("--model none/x.safetensors", "demo: none/x.safetensors: No such file or directory\n"),
        ("--json folder", "demo: folder: Is a directory\n"),
        ("--picture x.text", "demo: expected a picture named ."),
        ("--json x --model x", "demo: expected a file for each of what is written, got digits.png, x, x."),
    ],
)
def test_mistakes_are_told_before_the_work(refused, arguments, said):
    assert said in refused(arguments)


@pytest.mark.parametrize("missing", ["sklearn", "safetensors", "matplotlib"])
def test_what_is_missing_is_told_before_the_work(refused, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    how = 'In a checkout of this library, run: pip install ".[demo]".'
    assert refused() == f"demo: {missing} is missing. {how}\n"


def test_files_that_are_there_stay_as_they_are(folder):
    (folder / "digits.png").write_text("of a run before")
    assert flamingo_command(["demo", "--json", "none/x.json"]) == 2
    assert (folder / "digits.png").read_text() == "of a run before"


def test_a_lesson_that_is_not_learnt_is_status_1(folder, capsys, monkeypatch):
    def not_learnt(**options):
        raise lessons.NotLearntError('lesson "lists": expected 95% right')

    monkeypatch.setattr(command, "run", not_learnt)
    assert flamingo_command(["demo"]) == 1
    assert capsys.readouterr().err == 'demo: lesson "lists": expected 95% right\n'
    assert not [*folder.iterdir()]


@pytest.mark.parametrize(("eight", "status"), [(0.9, 0), (0.3, 1)])
def test_what_was_not_learnt_in_context_is_said_and_status_1(folder, capsys, monkeypatch, eight, status):
    """Its files are written all the same."""
    threads = []

    def found(*, seed, **options):
        threads.append(torch.get_num_threads())
        accuracy = {"captions": {0: 1.0}, "questions": {0: 1.0}, "codes": {0: 0.1, 8: eight}}
        return Findings(seed=seed, accuracy=accuracy), run.Flamingo(run.stages.CONFIG)

    monkeypatch.setattr(command, "run", found)
    before = torch.get_num_threads()
    many = min(2, os.cpu_count())
    assert flamingo_command(["demo", "--seed", "7", "--threads", str(many), "--json", "x.json"]) == status
    assert ("demo: drawn names after 8 shots: expected 80%" in capsys.readouterr().err) == bool(status)
    assert json.loads((folder / "x.json").read_text())["seed"] == 7
    assert {each.name for each in folder.iterdir()} == {"digits.png", "digits.safetensors", "x.json"}
    assert threads == [many]
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_it_learns_in_context(folder, seed):
    """From 8 shots the name of a digit that is drawn for the document, up to the task's ceiling of 92.7 %."""
    assert flamingo_command(["demo", "--seed", str(seed), "--json", "x.json"]) == 0
    found = json.loads((folder / "x.json").read_text())
    assert found["recall"] >= 0.95
    assert found["known"]["0"] >= 0.97
    assert 0.85 <= found["drawn"]["8"] <= 0.95
    assert found["drawn"]["8"] - found["drawn"]["0"] >= 0.7
    none, one, two, four, eight = found["drawn"].values()
    assert none < one < two < four < eight
