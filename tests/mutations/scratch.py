"""A copy of the project in which faults are planted, compiled and tested; nothing else is touched."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .faults import Fault

LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", ".benchmarks", "*.egg-info")
LIMIT = 900  # seconds for the tests of one fault, beyond which they hang
PASSED, FAILED = 0, 1  # what pytest returns


@dataclass(frozen=True)
class Run:
    """What pytest said: its status, the tests that failed, the end of its output, and how long it took."""

    status: int
    failed: list[str]
    tail: str
    seconds: float


class Scratch:
    """A copy of the project, with its compiled kernels."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        if (venv := root / ".venv").exists():  # tests look for other releases of libraries in it
            (folder / ".venv").symlink_to(venv)

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[dict[str, str]]:
        """The fault is in the copy; gives the environment that shows its compiled kernels to the tests.

        Raises:
            RuntimeError: it does not compile.
        """
        source = self.folder / fault.path
        text, times = source.read_text(), source.stat()
        try:
            source.write_text(fault.planted(text))
            with self._compiled(fault) as environment:
                yield environment
        finally:
            source.write_text(text)
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))

    @contextlib.contextmanager
    def _compiled(self, fault: Fault) -> Iterator[dict[str, str]]:
        """Compile what the fault is in, and put all objects back afterwards."""
        if not fault.path.startswith("csrc/"):
            yield {}
            return
        build, right, wrong = (self.folder / name for name in ("build", "right", "wrong"))
        shutil.copytree(build, right)
        try:
            environment = {}
            if not fault.path.startswith("csrc/cuda/"):
                emulate = {"FLAMINGO_KERNELS_EMULATE": "1"} if fault.emulate else {}
                self._compile(wrong, FLAMINGO_KERNELS_BUILD="cpu", **emulate)
                environment["FLAMINGO_KERNELS_EXTENSION"] = str(wrong / "flamingo_kernels/_C.abi3.so")
            if not fault.path.startswith("csrc/cpu/"):
                self._compile(wrong, FLAMINGO_KERNELS_EMULATE="cuda")
                environment["FLAMINGO_KERNELS_CUDA_EXTENSION"] = str(
                    wrong / "flamingo_kernels/_C_cuda.abi3.so"
                )
            yield environment
        finally:
            for folder in (build, wrong):
                shutil.rmtree(folder, ignore_errors=True)
            right.rename(build)

    def _compile(self, target: Path, **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(target)],
            cwd=self.folder,
            env=os.environ | environment,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"it does not compile: {done.stderr.strip().splitlines()[-1]}")

    def test(self, *arguments: str, **environment: str) -> Run:
        """Run pytest in the copy, in one process."""
        began = time.monotonic()
        # No bytecode: it is known by its source's second and size, which a fault may leave as they are.
        settings = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-r", "fE", "-p", "no:cacheprovider", *arguments],
                cwd=self.folder,
                env=os.environ | settings,
                text=True,
                errors="replace",
                capture_output=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Run(FAILED, [f"hangs: no end after {LIMIT} s"], "", time.monotonic() - began)
        output = done.stdout + done.stderr
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if done.returncode < 0:
            failed.append(f"crashes: signal {-done.returncode}")
        return Run(done.returncode, failed, output[-2000:], time.monotonic() - began)
