"""A copy of the project to edit, compile and test; the project itself is left alone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.build import run_setup

LEFT_OUT = (".git", ".venv", "__pycache__", ".*_cache", ".benchmarks", "*.egg-info")
LIMIT = 1800  # seconds, beyond which tests hang
PASSED, FAILED = 0, 1  # what pytest returns
OPTIONS = ("-q", "-r", "fE", "-p", "no:cacheprovider")
# No bytecode: it is known by its source's second and size, which an edit may leave as they are.
SETTINGS = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """What pytest said: its status, the tests that failed, the end of its output, and how long it took."""

    status: int
    failed: list[str]
    tail: str
    seconds: float

    @classmethod
    def of(cls, status: int, failed: list[str], output: str, began: float) -> Run:
        """A process that a signal has ended has failed too."""
        if status < 0:
            failed = [*failed, f"killed by signal {-status}: it crashes, or had no end after {LIMIT} s"]
        return cls(status, failed, output[-2000:], time.monotonic() - began)


class Scratch:
    """A copy of the project, with its compiled kernels."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        if (venv := root / ".venv").exists():  # tests look for other releases of libraries in it
            (folder / ".venv").symlink_to(venv)

    @contextlib.contextmanager
    def edited(self, path: str, text: str) -> Iterator[None]:
        """A file has another text, in this block."""
        source = self.folder / path
        before, times = source.read_text(), source.stat()
        try:
            source.write_text(text)
            yield
        finally:
            source.write_text(before)
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))

    @contextlib.contextmanager
    def compiled(self, *, cpu: bool, cuda: bool, **environment: str) -> Iterator[dict[str, str]]:
        """Compile the kernels as their sources are now; all objects are put back at the end of the block.

        Args:
            cpu, cuda: which: those of the processor, those for CUDA emulated on it.
            environment: of the compiler.

        Yields:
            The environment that makes the tests use them.

        Raises:
            RuntimeError: they do not compile.
        """
        build, kept, fresh = (self.folder / name for name in ("build", "kept", "fresh"))
        shutil.copytree(build, kept)
        try:
            found = {}
            if cpu:
                self._compile(fresh, {"FLAMINGO_KERNELS_BUILD": "cpu", **environment})
                found["FLAMINGO_KERNELS_EXTENSION"] = str(fresh / "flamingo_kernels/_C.abi3.so")
            if cuda:
                self._compile(fresh, {**environment, "FLAMINGO_KERNELS_EMULATE": "cuda"})
                found["FLAMINGO_KERNELS_CUDA_EXTENSION"] = str(fresh / "flamingo_kernels/_C_cuda.abi3.so")
            yield found
        finally:
            for folder in (build, fresh):
                shutil.rmtree(folder, ignore_errors=True)
            kept.rename(build)

    def _compile(self, target: Path, environment: dict[str, str]) -> None:
        done = run_setup(self.folder, target, **environment)
        if done.returncode:
            raise RuntimeError(f"it does not compile: {done.stderr.strip().splitlines()[-1]}")

    def test(self, *arguments: str, **environment: str) -> Run:
        """Run pytest in the copy, in one process."""
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *OPTIONS, *arguments],
                cwd=self.folder,
                env=os.environ | SETTINGS | environment,
                text=True,
                errors="replace",
                capture_output=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Run.of(-signal.SIGKILL, [], "", began)
        output = done.stdout + done.stderr
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Run.of(done.returncode, failed, output, began)
