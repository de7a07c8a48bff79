"""The CUDA kernels are built for one GPU in a process beside, and whatever comes of it is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flamingo_kernels._backends import env
from flamingo_kernels.commands.gpu import build as module
from tests.helpers import ROOT
from tests.helpers import cuda_binary as binary


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the library goes; the environment is as before after the test."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "flamingo_kernels" / "_C_cuda.abi3.so")
    monkeypatch.setattr(env, "CUDA_EXTENSION", env.CUDA_EXTENSION)
    monkeypatch.setenv(
        "FLAMINGO_KERNELS_CUDA_EXTENSION", os.environ.get("FLAMINGO_KERNELS_CUDA_EXTENSION", "")
    )
    return tmp_path


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler for sm_80 alone, which does what it is told when it compiles."""

    def install(when_compiling: str) -> None:
        path = tmp_path / "nvcc"
        known = (
            "case $1 in --version) echo release 13.0,; exit;; --list-gpu-arch) echo compute_80; exit;; esac"
        )
        path.write_text(f"#!/bin/sh\n{known}\n{when_compiling}\n")
        path.chmod(0o755)
        monkeypatch.setenv("NVCC", str(path))

    return install


def built(arch="80", seconds=300.0):
    return module.Building(arch).finish(time.monotonic() + seconds)


def test_a_build_that_fails_says_why(folder, nvcc):
    nvcc("echo no such instruction >&2; exit 1")
    assert re.fullmatch(
        r"no CUDA kernels: flamingo_kernels: csrc/cuda/\w+\.cu does not compile: no such instruction", built()
    )
    assert "no such instruction" in (folder / "log.txt").read_text()


def test_nvcc_is_asked_for_registers_and_spills(folder, nvcc):
    nvcc('echo "$NVCC_APPEND_FLAGS" >&2; exit 1')
    assert built().endswith("--resource-usage")


def test_a_gpu_that_nvcc_does_not_know(folder, nvcc):
    nvcc("exit 1")
    assert built("90").endswith("FLAMINGO_KERNELS_CUDA_ARCHS=90: nvcc 13.0 knows compute_80.")


def test_a_build_without_setuptools_says_so(folder, nvcc, monkeypatch):
    nvcc("exit 1")
    (folder / "setuptools.py").write_text("raise ModuleNotFoundError('No module named setuptools')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    assert built() == "no CUDA kernels: ModuleNotFoundError: No module named setuptools"


def test_a_build_that_takes_too_long_ends_with_all_its_processes(folder, nvcc):
    nvcc(f"echo $$ > {folder}/pid; sleep 600")
    building = module.Building("80")
    while not (folder / "pid").exists():
        time.sleep(0.05)
    assert building.finish(time.monotonic()).endswith("nvcc was not done in time")
    pid = int((folder / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("nvcc goes on")


def test_a_library_of_other_sources_is_not_left(folder, nvcc):
    nvcc("exit 1")
    module.LIBRARY.parent.mkdir()
    module.LIBRARY.write_text("of an earlier build")
    built()
    assert not module.LIBRARY.exists()
    assert os.environ["FLAMINGO_KERNELS_CUDA_EXTENSION"] == env.CUDA_EXTENSION == str(module.LIBRARY)


def test_why_nothing_is_built(folder, monkeypatch):
    monkeypatch.setattr(module, "NVCC", "no-such-nvcc")
    assert module.begin("cuda:0") == "no CUDA kernels built: no-such-nvcc is not on the PATH"
    monkeypatch.setattr(module, "ROOT", folder)
    assert module.begin("cuda:0") == "CUDA kernels as they are installed: their sources are not here"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert module.begin("cuda:0") == "no CUDA kernels: this torch is for AMD GPUs"


@pytest.mark.slow
def test_a_build_for_one_gpu(folder):
    if shutil.which(module.NVCC) is None:
        pytest.skip(f"no {module.NVCC}")
    assert built("90", seconds=600).startswith("CUDA kernels built for sm_90 in ")
    if binary.tool() is not None:
        assert len(binary.kernels(module.LIBRARY, "90")) > 60
    code = (
        "from flamingo_kernels._backends import cuda\n"
        "print(cuda.build())\nprint(cuda.why_not() or 'it loads')"
    )
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    build, able = said.splitlines()
    assert build.endswith("; sm_90 and PTX of 90")
    # a torch for the CPU has no streams: the symbol that says so is the first that is missing
    assert able == "it loads" or "aoti_torch_get_current_cuda_stream" in able or "no GPU" in able
