"""Builds the CUDA kernels for this machine's GPU alone, in a process beside this one, under `build/`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import torch

from ..._backends import env
from ..._backends.missing import failed_build, record_of_failure
from ..info import ROOT

FOLDER = ROOT / "build" / "gpu"
LIBRARY = FOLDER / "flamingo_kernels" / "_C_cuda.abi3.so"
NVCC = os.environ.get("NVCC", "nvcc")


class Building:
    """A build in the background. This process, and those it starts from now on, load what it builds.

    Args:
        arch: of the GPU, as in "90".
    """

    def __init__(self, arch: str) -> None:
        self.arch, self.began = arch, time.monotonic()
        FOLDER.mkdir(parents=True, exist_ok=True)
        for left in (LIBRARY, record_of_failure(LIBRARY)):  # by an earlier build, of other sources
            left.unlink(missing_ok=True)
        os.environ["FLAMINGO_KERNELS_CUDA_EXTENSION"] = env.CUDA_EXTENSION = str(LIBRARY)
        self.log = FOLDER / "log.txt"
        wanted = {"BUILD": "cuda-alone", "CUDA_ARCHS": arch, "EMULATE": ""}
        named = {f"FLAMINGO_KERNELS_{name}": value for name, value in wanted.items()}
        told = (
            f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --resource-usage"  # registers, spills, shared memory
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(FOLDER)],
                cwd=ROOT,
                env=os.environ | named | {"NVCC_APPEND_FLAGS": told},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, end: float) -> str:
        """Wait for it until `end` on the clock of `time.monotonic`; what came of it, in words."""
        try:
            status = self.process.wait(timeout=max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # nvcc and what it runs too
            return f"no CUDA kernels: {NVCC} was not done in time"
        if status:
            lines = self.log.read_text().strip().splitlines() or [f"exit status {status}"]
            return f"no CUDA kernels: {failed_build(LIBRARY) or lines[-1]}"
        return f"CUDA kernels built for sm_{self.arch} in {time.monotonic() - self.began:.0f} s"


def begin(device: str) -> Building | str:
    """Start to build, or say why not: then there are Triton's kernels, and those that are installed."""
    if torch.device(device).type == "cpu":
        return ""
    if torch.version.hip:
        return "no CUDA kernels: this torch is for AMD GPUs"
    if not (ROOT / "setup.py").exists():
        return "CUDA kernels as they are installed: their sources are not here"
    if shutil.which(NVCC) is None:
        return f"no CUDA kernels built: {NVCC} is not on the PATH"
    return Building("{}{}".format(*torch.cuda.get_device_capability(device)))
