"""What `info` reads of the machine: the commit, also of a copy, and the clock of a GPU."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from flamingo_kernels.commands import info


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "ROOT", tmp_path)
    monkeypatch.setattr(info, "commit", info.commit.__wrapped__)
    return tmp_path


def test_the_commit_of_a_copy_is_in_a_file(root):
    assert info.commit() is None
    (root / "COMMIT").write_text("\n")
    assert info.commit() is None
    (root / "COMMIT").write_text("abc1234-dirty\n")
    assert info.commit() == "abc1234-dirty"


def test_a_clone_knows_better_than_a_file(root):
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "--quiet"], check=True)
    except OSError:
        pytest.skip("no git")
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    (root / "COMMIT").write_text("of an earlier copy\n")
    head = subprocess.run([*git, "rev-parse", "HEAD"], text=True, capture_output=True, check=True).stdout
    assert head.startswith(info.commit())


@pytest.mark.parametrize(
    ("says", "clock"),
    [("echo 1980", 1980), ("echo '[N/A]'", None), ("exit 9", None), (None, None)],
    ids=["a number", "nothing", "an error", "no nvidia-smi"],
)
def test_the_clock_of_a_gpu(tmp_path, monkeypatch, says, clock):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        info.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0123-abcd")
    )
    if says is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-0123-abcd ] || exit 1\n{says}\n')
        program.chmod(0o755)
    assert info.sm_clock("cuda:0") == clock
    assert info.sm_clock("cpu") is None
