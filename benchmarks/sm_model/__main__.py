"""Predicts the time of the kernels of named shapes, from their machine code."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from .multiprocessor import H100, H200, predict
from .work import all_work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sm_model", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write microseconds by shape")
    parser.add_argument("--h100", action="store_true", help="for an H100 instead of an H200")
    options = parser.parse_args()
    device, nvcc = H100 if options.h100 else H200, shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on the PATH: the CUDA kernels are left out", file=sys.stderr)
    print(f"predicted, not measured: microseconds on an {device.name}, without the launches")
    predicted = {}
    for work in all_work(nvcc):
        parts = [predict(launch, device) for launch in work.launches]
        total, floor = (sum(getattr(each, name) for each in parts) for name in ("microseconds", "floor"))
        predicted[work.name] = round(total, 2)
        print(f"{work.name:<44}{total:8.1f}  floor {floor:6.1f} ({floor / total:.0%})", flush=True)
        for each in parts:
            busy = ", ".join(f"{name} {share:.0%}" for name, share in each.busy.items())
            print(f"    {each.name:<40}{each.microseconds:8.1f}  busy: {busy}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(predicted, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
