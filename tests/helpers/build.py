"""Builds of the C++ extension that only tests want."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


def build_extension(source: Path, target: Path, **environment: str) -> Path:
    """Build the C++ kernels of a checkout into a folder; skip the test where that cannot be done."""
    if not (source / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    done = run_setup(source, target, FLAMINGO_KERNELS_BUILD="cpu", **environment)
    assert done.returncode == 0, done.stderr
    return target / "flamingo_kernels" / "_C.abi3.so"


def run_setup(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Compile the kernels of a checkout, whatever they are by the environment, into a folder."""
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(target)],
        cwd=source,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )


def run_tests(*selection: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of pytest in a fresh process, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        capture_output=True,
    )
    return done.returncode, done.stdout + done.stderr
