"""`make gpu`: proves the kernels on this machine's GPU and times them, in one command of under nine minutes.

plan       what is proved and timed, and for how long, as data
run        the steps, in order
crew       processes that share the work; one that hangs is ended
watchdog   ends the program when its time is over
build      the CUDA kernels, for this GPU
proofs     what is proved of one call: accuracy, determinism, graphs, offsets past 2^31
sanitizer  compute-sanitizer over small calls
configs    every configuration of the Triton kernels: time, registers, spills, shared memory
kernels    the time of every kernel within a call
work       what is measured in one task
launch     what a call costs the host
outcome    all that was found, and what of it is wrong
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

from .watchdog import leave, watchdog

if TYPE_CHECKING:
    from .outcome import Outcome

RESULTS = Path("benchmarks/results")
REHEARSAL = Path("build/rehearsal")  # results of a cpu say nothing about a GPU and are not kept
GRACE = 15.0  # seconds for the last step to end and be saved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="in three minutes: fewer cases and rivals")
    part.add_argument(
        "--configs", action="store_true", help="in four minutes: every configuration of the Triton kernels"
    )
    parser.add_argument(
        "--device", default="cuda:0", help='a GPU, or "cpu" for a rehearsal (default: cuda:0)'
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where results go (default: benchmarks/results/<device>)"
    )
    parser.add_argument("--load", metavar="DIR", help="show earlier results instead of running")


def main(options: argparse.Namespace) -> int:
    """The command `gpu`: 0 if all is right, 1 if something is not.

    Raises:
        ImportError: a package is missing.
        OSError: results cannot be read, or written.
        ValueError: there is no such device, or the results are none.
    """
    from ..info import device_name, expect_device
    from .report import expect_folder, load, summary

    if options.load:
        outcome = load(Path(options.load))
        print(summary(outcome))
        return int(bool(outcome.failures))
    expect_device(options.device)
    folder = Path(options.out) if options.out else _folder(options.device, device_name(options.device))
    expect_folder(folder)
    outcome = _run(options, folder)
    print(f"{summary(outcome)}\nwritten to {folder}", flush=True)
    if outcome.stuck:
        leave(1)
    return int(bool(outcome.failures))


def _run(options: argparse.Namespace, folder: Path) -> Outcome:
    import torch

    from .build import begin
    from .plan import CONFIGS, FULL, QUICK, REHEARSAL
    from .report import draw, save
    from .run import run

    device, plan = options.device, REHEARSAL
    if torch.device(device).type == "cuda":
        device = f"cuda:{torch.device(device).index or 0}"
        plan = CONFIGS if options.configs else QUICK if options.quick else FULL
    building = "" if options.configs else begin(device)
    with watchdog(plan.seconds + GRACE):
        outcome = run(
            plan,
            device,
            workers=_workers(),
            building=building,
            say=_Say(),
            save=lambda outcome: save(outcome, folder),
        )
        draw(outcome, folder)
    return outcome


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
