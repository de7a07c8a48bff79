"""The reference does without `flamingo_kernels`, and asks for it in one place."""

import sys
from pathlib import Path

import flamingo
from flamingo import kernels
from flamingo_kernels import patch


def test_one_file_names_the_kernels():
    files = Path(flamingo.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "flamingo_kernels" in file.read_text()] == ["kernels.py"]


def test_where_they_are_installed():
    assert kernels.find_patch() is patch


def test_where_they_are_not(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_kernels", None)
    assert kernels.find_patch() is None
    assert capsys.readouterr().out.startswith("without kernels: ")
