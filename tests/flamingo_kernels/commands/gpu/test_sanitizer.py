"""The sanitizer's own program is a stub here, which runs what it is given; all else is real."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from flamingo_kernels.commands.gpu import sanitizer
from flamingo_kernels.commands.gpu.sanitizer import Inspection, inspect
from tests.helpers import ROOT

RUN = """
assert arguments[:4] == ["--tool", "memcheck", "--error-exitcode", "99"], arguments
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= COMPUTE-SANITIZER")
os.execv(arguments[4], arguments[4:])
"""
FIND = """
print("========= COMPUTE-SANITIZER")
print("========= Invalid __global__ write of size 4 bytes")
print("=========     at _sum_kernel+0x10")
print("========= ERROR SUMMARY: 1 error")
sys.exit(99)
"""
REFUSE = """
print("========= COMPUTE-SANITIZER")
print("========= Error: Device not supported. Please refer to the documentation")
sys.exit(1)
"""
HANG = """
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(os.environ["PID_FILE"], "w").write(str(child.pid))
time.sleep(300)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a compute-sanitizer on the PATH."""

    def write(code: str) -> None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!{sys.executable}\nimport os, sys\narguments = sys.argv[1:]\n{code}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))

    return write


def result(seconds=120.0, backends=("reference",)):
    found = inspect(Inspection("memcheck", "cpu", backends, time.monotonic() + seconds))
    assert (found.check, found.backend) == ("sanitizer memcheck", ", ".join(backends))
    return found.status, found.detail


def test_small_calls_run_under_it(install):
    install(RUN)
    assert result() == ("ok", "")


def test_calls_that_fail_are_a_failure(install, monkeypatch):
    install(RUN)
    monkeypatch.setenv("FLAMINGO_KERNELS_CUDA_EXTENSION", "not-there.so")
    status, detail = result(backends=("cuda",))
    assert status == "failed"
    assert "exit status 1" in detail
    assert "UnsupportedError" in detail


def test_what_it_finds_is_a_failure(install):
    install(FIND)
    assert result() == (
        "failed",
        "exit status 99: Invalid __global__ write of size 4 bytes; ERROR SUMMARY: 1 error",
    )


def test_a_device_that_it_refuses_is_skipped(install):
    install(REFUSE)
    assert result() == ("skipped", "Error: Device not supported. Please refer to the documentation")


def test_without_it_that_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert result() == ("skipped", "compute-sanitizer is not on the PATH")


def test_when_the_time_is_over_all_its_processes_end(install, tmp_path, monkeypatch):
    install(HANG)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    began = time.monotonic()
    assert result(seconds=2.0) == ("late", "no time was left")
    assert time.monotonic() - began < 20
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the program under the sanitizer goes on")


def test_every_operator_is_among_the_small_calls():
    assert {case.operator for case in sanitizer.SMALL} == set(sanitizer.CASES)
