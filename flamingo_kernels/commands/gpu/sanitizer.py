"""Small calls of every operator under NVIDIA's compute-sanitizer: reads and writes out of bounds, and races.

Run as a program, this file makes the calls and nothing else:
`python -m flamingo_kernels.commands.gpu.sanitizer DEVICE BACKEND...`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from ..._backends import dispatch
from ...testing import CASES, Case, MaskedCrossAttentionCase, PerceiverAttentionCase
from .proofs import Call, Finding

TOOLS = ("memcheck", "racecheck")
EXAMPLES: list[Case] = [example() for example in CASES.values()]
SMALL: list[Case] = [
    *EXAMPLES,
    MaskedCrossAttentionCase(immediate=False, policy="open_flamingo", groups=2, length=67),
    PerceiverAttentionCase(lengths=(0, 7), features=70),
]
_FOUND = 99  # exit status of the sanitizer where it found something


class Inspection(NamedTuple):
    """One tool over all small calls."""

    tool: str
    device: str
    backends: tuple[str, ...]
    end: float  # on the clock of `time.monotonic`


def inspect(inspection: Inspection) -> Finding:
    """Run a tool in processes of its own, and end them all when the time is over."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return finding(inspection, "skipped", "compute-sanitizer is not on the PATH")
    options = ["--tool", inspection.tool, "--error-exitcode", str(_FOUND)]
    calls = [sys.executable, "-m", __name__, inspection.device, *inspection.backends]
    process = subprocess.Popen(
        [program, *options, *calls],
        # Each tensor gets memory of its own: within torch's pool no access is out of bounds.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(inspection.end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what runs under the sanitizer too
        process.communicate()
        return finding(inspection, "late", "no time was left")
    return finding(inspection, *_verdict(process.returncode, output.splitlines()))


def finding(inspection: Inspection, status: str, detail: str) -> Finding:
    """What an inspection came to."""
    backends = ", ".join(inspection.backends)
    return Finding(f"sanitizer {inspection.tool}", "all", backends, "all", "small calls", status, detail)


def _verdict(status: int, output: list[str]) -> tuple[str, str]:
    if status == 0:
        return "ok", ""
    told = [line.strip("= ") for line in output if line.startswith("=========")]
    if any("not supported" in line for line in told):
        return "skipped", next(line for line in told if "not supported" in line)
    said = told[1:] or output or ["no output"]
    return "failed", f"exit status {status}: {said[0]}; {said[-1]}"  # what it found first, and the sum


def main(device: str, *backends: str) -> None:
    """Every small case forward and backward, once for each backend that has the operator."""
    for backend in backends:
        for case in (case for case in SMALL if backend in dispatch.limits(case.operator)):
            for dtype in (torch.bfloat16, torch.float32):
                Call(replace(case, dtype=dtype, device=device), backend).both()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
