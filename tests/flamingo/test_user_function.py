"""What `FILE.py:NAME` and `module:NAME` name, and how a wrong name is refused."""

from __future__ import annotations

import json
import os
import sys

import pytest

from flamingo.user_function import user_function


@pytest.fixture(autouse=True)
def _leaves_nothing(monkeypatch):
    """A file stays where modules are found, as it does for a command."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("its_file", "its_neighbour", "fails"):
        sys.modules.pop(name, None)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "its_neighbour.py").write_text("answer = 42\n")
    (tmp_path / "its_file.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from its_neighbour import answer\n"
        "@dataclass\n"
        "class Kept:\n"
        "    number: int = answer\n"
        "    def doubled(): return 84\n"
        "def give(): return Kept().number\n"
        "number = 3\n"
    )
    return tmp_path / "its_file.py"


def test_a_file_is_run_with_what_lies_beside_it(file):
    assert user_function(f"{file}:give")() == 42
    assert user_function(f"{file}:Kept.doubled")() == 84


def test_a_module_is_imported_from_the_working_directory_too(file, monkeypatch):
    assert user_function("json:dumps") is json.dumps
    monkeypatch.chdir(file.parent)
    assert user_function("its_file:give")() == 42


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("give", "expected FILE.py:NAME or module:NAME, got 'give'"),
        (":give", "expected FILE.py:NAME or module:NAME, got ':give'"),
        ("{file}:", "expected FILE.py:NAME or module:NAME, got"),
        ("gone.py:give", "found none at gone.py"),
        ("{file}:gone", "expected a function gone in .*its_file.py, found none"),
        ("{file}:number", "expected a function number in .*its_file.py, got int"),
        (".json:dumps", "expected the whole name of a module, got '.json'"),
        ("{fails}:give", "expected code that can be run in .*fails.py, got ZeroDivisionError: "),
        ("{ends}:give", "expected code that can be run in .*ends.py, got SystemExit: 3"),
    ],
)
def test_what_is_no_function_is_refused_in_a_line(name, message, file):
    fails = file.parent / "fails.py"
    fails.write_text("1 / 0\n")
    ends = file.parent / "ends.py"
    ends.write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match=message) as caught:
        user_function(name.format(file=file, fails=fails, ends=ends))
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ImportError, match="no_such_module"):
        user_function("no_such_module:give")


def test_a_file_runs_once_and_again_when_it_has_changed(tmp_path):
    """One that fails leaves no half module behind."""
    file = tmp_path / "counted_here.py"
    file.write_text("import sys\nsys.runs = getattr(sys, 'runs', 0) + 1\ndef make(): return sys.runs\n")
    try:
        made = [user_function(f"{file}:make") for _ in range(3)]
        assert [each() for each in made] == [1, 1, 1]
        assert made[0] is made[2]
        file.write_text(file.read_text() + "1 / 0\n")
        os.utime(file, (0, 0))
        with pytest.raises(ValueError, match="division by zero"):
            user_function(f"{file}:make")
    finally:
        del sys.runs
    sys.modules.pop("counted_here")
    broken = tmp_path / "broken_here.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="division by zero"):
        user_function(f"{broken}:make")
    assert "broken_here" not in sys.modules
