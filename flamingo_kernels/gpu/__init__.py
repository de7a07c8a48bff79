"""`make gpu`: proves the kernels on this machine's GPU and times them, in one command of under nine minutes.

plan       what is proved and timed, and for how long, as data
proofs     what is proved of one call: accuracy, determinism, graphs, offsets past 2^31
build      the CUDA kernels, for this GPU
crew       processes that share the proofs
sanitizer  compute-sanitizer over small calls
launch     what a call costs the host
run        the steps, in order
report     the files and the table
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Outcome

RESULTS = Path("benchmarks/results")
REHEARSAL = Path("build/rehearsal")  # what a cpu does says nothing of a GPU, and is not kept


def main(options: argparse.Namespace) -> int:
    """The command `gpu`: 0 if all is right, 1 if something is not, 2 if it cannot do what was asked."""
    from ..info import why_not_on
    from .report import load, save, summary

    if options.load:
        outcome = load(Path(options.load))
        print(summary(outcome))
        return int(bool(outcome.failures))
    if why := why_not_on(options.device):
        print(f"gpu: {why}", file=sys.stderr)
        return 2
    outcome = _run(options.device, options.quick)
    folder = Path(options.out) if options.out else _folder(options.device, outcome.environment["device"])
    save(outcome, folder)
    print(f"{summary(outcome)}\nwritten to {folder}", flush=True)
    return int(bool(outcome.failures))


def _run(device: str, quick: bool) -> Outcome:
    import torch

    from .build import begin
    from .plan import FULL, QUICK, REHEARSAL
    from .run import run

    if torch.device(device).type == "cpu":
        return run(REHEARSAL, device, say=_Say())
    device = f"cuda:{torch.device(device).index or 0}"
    torch.cuda.set_device(device)
    return run(QUICK if quick else FULL, device, workers=_workers(), building=begin(device), say=_Say())


def _workers() -> int:
    """A core for each, less those of this process and of what else runs here."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def _folder(device: str, name: str) -> Path:
    """Where results go: those of "NVIDIA H100 80GB HBM3" to nvidia-h100-80gb-hbm3."""
    if device == "cpu":
        return REHEARSAL
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class _Say:
    """Tells on stderr what is going on, and since when."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", file=sys.stderr, flush=True)
