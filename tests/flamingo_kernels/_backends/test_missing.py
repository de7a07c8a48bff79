"""What is said where the compiled kernels are missing, and where it is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo_kernels.__main__ import main
from flamingo_kernels._backends import cpu, cuda, missing, triton
from flamingo_kernels.commands import check
from flamingo_kernels.commands.bench import run
from flamingo_kernels.commands.bench.rows import Run
from tests.helpers import ROOT

PATCH = """
import warnings
import flamingo
from flamingo_kernels import patch
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    patch(flamingo.PerceiverResampler(dim=8, depth=1))
print(*[each.message for each in said], sep="|")
"""
GIT = {"url": "https://example.org/k.git", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a process that finds no kernels."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLAMINGO", "TRITON"))}
    return kept | {"FLAMINGO_KERNELS_EXTENSION": str(tmp_path / "_C.abi3.so"), "CUDA_VISIBLE_DEVICES": ""}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True
    )


def test_patch_warns_where_no_kernels_run(bare):
    said = python("-c", PATCH, **bare)
    assert said.stdout.startswith("patch: no kernels run here, PyTorch computes alone: "), said.stderr
    assert (
        "the C++ extension is not built; install a C++ compiler, if there is none, and run `" in said.stdout
    )
    assert said.stdout.count("|") == 0, "one warning"
    asked_for = python("-c", PATCH, **bare, FLAMINGO_KERNELS_BACKEND="reference")
    assert asked_for.stdout == "\n", asked_for.stderr


def test_patch_is_silent_where_kernels_run(bare):
    if not Path(missing.__file__).parents[1].joinpath("_C.abi3.so").exists():
        pytest.skip("the C++ extension is not built")
    assert python("-c", PATCH, **bare | {"FLAMINGO_KERNELS_EXTENSION": ""}).stdout == "\n"


@pytest.fixture
def no_kernels(monkeypatch) -> None:
    """This process finds none, and no command does its work."""
    for backend in (cpu, cuda, triton):
        monkeypatch.setattr(backend, "why_not", lambda: "none were found")
    monkeypatch.setattr(check, "rows", lambda device: iter(()))
    monkeypatch.setattr(run, "run", lambda *cases, **options: Run([], []))


@pytest.mark.parametrize("command", ["bench", "check"])
def test_commands_tell_where_no_kernels_run(command, no_kernels, capsys):
    assert main([command]) == 0
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "of this machine busy" not in line]  # as it may be
    assert line == f"{command}: no kernels run here, PyTorch computes alone: none were found"


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (None, "flamingo-kernels"),
        ({"url": "file:///tmp/k", "dir_info": {}}, "file:///tmp/k"),
        (GIT, "git+https://example.org/k.git@12ab"),
    ],
    ids=["index", "folder", "git"],
)
def test_an_installed_package_is_built_anew_from_where_it_came(record, named, tmp_path, monkeypatch):
    monkeypatch.setattr(missing, "__file__", str(tmp_path / "a" / "b" / "missing.py"))
    found = SimpleNamespace(read_text=lambda name: record and json.dumps(record))
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    why = missing.why_missing(tmp_path / "_C.so", "the kernels are", compiler="c++", build="cpu")
    options = "--no-deps --force-reinstall --no-cache-dir"
    assert why.endswith(f"and run `FLAMINGO_KERNELS_BUILD=cpu pip install {options} {named}`")


@pytest.mark.parametrize("editable", [True, False])
def test_in_a_checkout_that_is_what_pip_installs(editable, tmp_path, monkeypatch):
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(missing, "__file__", str(tmp_path / "a" / "b" / "missing.py"))
    record = json.dumps({"url": "file:///elsewhere", "dir_info": {"editable": editable}})
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: record))
    why = missing.why_missing(tmp_path / "_C.so", "the kernels are", compiler="c++", build="cpu")
    assert re.search(rf"--no-cache-dir {'--editable ' * editable}{tmp_path}`$", why)


def test_a_wheel_is_not_installed_again(tmp_path, monkeypatch):
    """It has no more in it than the first time: the source is wanted."""
    monkeypatch.setattr(missing, "__file__", str(tmp_path / "a" / "b" / "missing.py"))
    record = json.dumps(
        {"url": "file:///dist/flamingo_kernels-1-cp310-abi3-linux_x86_64.whl", "archive_info": {}}
    )
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: record))
    why = missing.why_missing(tmp_path / "_C.so", "the kernels are", compiler="c++", build="cpu")
    assert "if there is none, and in a checkout of the source run `" in why
    assert why.endswith("--no-cache-dir .`")


def test_a_package_that_pip_did_not_install(tmp_path, monkeypatch):
    monkeypatch.setattr(missing, "__file__", str(tmp_path / "a" / "b" / "missing.py"))

    def nowhere(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nowhere)
    assert "flamingo-kernels`" in missing.why_missing(
        tmp_path / "_C.so", "it is", compiler="c++", build="cpu"
    )
