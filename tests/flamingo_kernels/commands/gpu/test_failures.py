"""Whatever fails in `make gpu`, it says so and ends with status 1; what was finished is in the files."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels._backends import cuda, dispatch, env
from flamingo_kernels.commands import gpu as module
from flamingo_kernels.commands.gpu import build, run
from flamingo_kernels.commands.gpu import plan as plans
from flamingo_kernels.commands.gpu.plan import Plan, Time
from flamingo_kernels.testing import GatedResidualCase
from tests.flamingo_kernels.commands.gpu.test_build import folder, nvcc  # noqa: F401
from tests.helpers import ROOT
from tests.helpers.planted import Faulty

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="Triton's interpreter is off")


@pytest.fixture
def gpu(monkeypatch, tmp_path, capsys):
    """Rehearse a plan for one operator: the status, what was printed last, and what is in the files."""
    monkeypatch.setattr(dispatch, "_OPERATORS", {"gated_residual": dispatch._OPERATORS["gated_residual"]})

    def rehearse(*cases, steps, workers=0, backends=("triton",)):
        plan = Plan(
            steps=steps,
            seconds=200,
            cases=list(cases),
            repeated=[RIGHT],
            dtypes=(torch.float32,),
            backends=backends,
        )
        monkeypatch.setattr(plans, "REHEARSAL", plan)
        monkeypatch.setattr(module, "_workers", lambda: workers)
        status = module.main(options(tmp_path / "results"))
        return status, capsys.readouterr().out, read(tmp_path / "results")

    return rehearse


def options(out, **changes):
    given = {"device": "cpu", "out": str(out), "load": None, "quick": False, "configs": False}
    return argparse.Namespace(**given | changes)


def read(results):
    return {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}


PROVE = {"build": Time(math.inf), "parity": Time(math.inf)}
RIGHT = GatedResidualCase(shape=(3, 40))


def test_without_a_fault_the_status_is_0(gpu):
    status, said, files = gpu(RIGHT, steps=PROVE)
    assert status == 0
    assert files["environment"]["able"] == {"gated_residual": {"triton": True}}
    assert "all ran and is right; 1 of 1 kernels ran" in said


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("zeros", "error of "),
        ("raise_error", "RuntimeError: CUDA error: misaligned address"),
        ("import_what_is_missing", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_kernel_with_a_fault(gpu, fault, said):
    status, printed, files = gpu(Faulty(shape=(3, 40), fault=fault), RIGHT, steps=PROVE)
    assert status == 1
    assert (
        f"parity, gated_residual, triton/interpreter, float32, shape=(3,40),fault={fault}: {said}" in printed
    )
    assert "FAILED; " in printed.splitlines()[-2]
    assert {each["status"] for each in files["parity"] if "fault" not in each["case"]} == {"ok"}


def test_a_kernel_that_hangs_costs_its_task(gpu):
    faulty = Faulty(shape=(3, 40), fault="hang")
    steps = PROVE | {"parity": Time(math.inf, 5), "determinism": Time(math.inf)}
    status, printed, files = gpu(RIGHT, faulty, steps=steps, workers=1)
    assert status == 1
    assert "shape=(3,40),fault=hang: it hangs: not done after 5 s" in printed
    right = [each for each in files["parity"] if "fault" not in each["case"]]
    assert {each["check"] for each in right if each["status"] == "ok"} == {"parity", "repeats"}
    assert not [each for each in right if each["status"] in ("failed", "late")]


def test_a_build_that_fails_where_there_is_nvcc(gpu, folder, nvcc, monkeypatch):  # noqa: F811
    nvcc("echo no such instruction >&2; exit 1")
    monkeypatch.setattr(build, "begin", lambda device: build.Building("80"))
    monkeypatch.setattr(cuda, "_load", cuda._load.__wrapped__)  # which has not loaded another one
    status, printed, _ = gpu(RIGHT, steps=PROVE, backends=("cuda", "triton"))
    assert status == 1
    assert "does not compile: no such instruction" in printed
    assert "gated_residual, cuda: it does not run here: " in printed
    assert "FAILED; 1 of 2 kernels ran" in printed
    assert "no such instruction" in (folder / "results" / "build.txt").read_text()


def test_triton_that_is_not_there(gpu, monkeypatch):
    able = {"triton": "triton is not installed", "cpu": True, "reference": True}
    monkeypatch.setattr(run.check, "backends_on", lambda *_: able)
    status, printed, _ = gpu(RIGHT, steps=PROVE, backends=("triton", "cpu"))
    assert status == 1
    assert "did not run: triton: triton is not installed (gated_residual)" in printed
    assert printed.splitlines()[-2] == "FAILED; 1 of 2 kernels ran"


def test_a_step_that_raises(gpu, monkeypatch):
    def broken(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run._Steps, "launches", broken)
    status, printed, files = gpu(RIGHT, steps=PROVE | {"launches": Time(9), "determinism": Time(math.inf)})
    assert status == 1
    assert "launches: RuntimeError: out of memory" in printed
    assert {each["check"] for each in files["parity"]} >= {"parity", "repeats"}


def test_a_machine_that_says_nothing_of_itself_loses_no_result(gpu, monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(run.info, "collect", broken)
    status, printed, files = gpu(RIGHT, steps=PROVE)
    assert status == 1
    assert "build: OSError: no such device" in printed
    assert {each["status"] for each in files["parity"]} == {"ok"}


def test_a_module_that_the_command_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "flamingo_kernels.commands.gpu.plan", None)
    assert cli.main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("gpu: import of flamingo_kernels.commands.gpu.plan halted")


def test_results_that_cannot_be_written_are_told_before_the_work(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("it began"))
    assert cli.main(["gpu", "--device", "cpu", "--out", f"{tmp_path}/file/results"]) == 2
    assert capsys.readouterr().err == f"gpu: {tmp_path}/file/results: Not a directory\n"


def test_a_disk_that_fills_does_not_end_the_run(gpu, monkeypatch):
    from flamingo_kernels.commands.gpu import report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save", full)
    status, printed, _ = gpu(RIGHT, steps=PROVE)
    assert status == 1
    assert "files: OSError: [Errno 28] No space left on device" in printed


def test_what_a_step_has_found_is_in_the_files_when_the_next_begins(gpu, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run._Steps, "launches", lambda self: seen.append(read(tmp_path / "results")))
    gpu(RIGHT, steps=PROVE | {"launches": Time(9)})
    assert {each["status"] for each in seen[0]["parity"]} == {"ok"}
    assert set(seen[0]["environment"]["seconds"]) == set(PROVE)


def test_the_command_ends_itself(gpu, monkeypatch):
    given = []

    @contextmanager
    def watchdog(seconds):
        given.append(seconds)
        yield

    monkeypatch.setattr(module, "watchdog", watchdog)
    gpu(RIGHT, steps={})
    assert given == [200 + module.GRACE]
    assert plans.FULL.seconds + module.GRACE <= 500
    assert plans.CONFIGS.seconds + module.GRACE <= 250


HANGS = """
import multiprocessing, time
from flamingo_kernels.commands.gpu.watchdog import watchdog

if __name__ == "__main__":
    with watchdog(60):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
    print(child.pid, flush=True)
    with watchdog(0.5):
        time.sleep(600)
"""


def test_a_program_that_hangs_is_ended_with_its_processes(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], text=True, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "gpu: FAILED: it hangs, and was ended after 0 s\n")
    state = Path("/proc", done.stdout.strip(), "stat")
    for _ in range(100):
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("its process goes on")
