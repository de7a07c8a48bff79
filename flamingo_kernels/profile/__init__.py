"""Profiles a model before and after `patch`, both in one run, after checking that they compute the same.

models         what can be profiled: a registry of models, each with its inputs and its kinds of work
third_party    the tiny models of other libraries for that registry
run            compare, then time, weigh and profile
parts          which module belongs to which part, and what torch.profiler says each part took
count          shapes, bytes and FLOPs of a model that does not fit into memory
report         the page of text and the picture
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(options: argparse.Namespace) -> int:
    """The command `profile`: 1 if the patched model computes something else, 2 if it cannot, else 0."""
    import torch

    from . import count, models, report, run

    dtype = getattr(torch, options.dtype)
    try:
        _refuse_early(options)
        plan = models.plan(options.model, quick=options.quick)
        lacking = count.lacking_memory(plan, dtype, options.device)
    except (ImportError, ValueError) as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if lacking:
        counted = count.run(plan, dtype, options.device, lacking)
        print(report.counted(counted))
        _save(counted, options.json)
        if options.trace or options.picture:
            print("profile: nothing was run, so there is no trace and no picture.", file=sys.stderr)
        return 0
    seconds = 0.1 if options.quick else 5.0
    found = run.run(plan, dtype=dtype, device=options.device, seconds=seconds, trace=options.trace)
    print(report.measured(found))
    _save(found, options.json)
    if options.picture and found.same:
        report.picture(found, options.picture)
    return int(not found.same)


def _refuse_early(options: argparse.Namespace) -> None:
    """Let what would fail at the end fail before the work."""
    from ..bench.report import new_figure
    from ..info import why_not_on

    if why := why_not_on(options.device):
        raise ValueError(f"{why}.")
    if options.picture:
        new_figure()
    for path in filter(None, (options.trace, options.json, options.picture)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"expected a path in a folder that exists, got {path}: make its folder first.")


def _save(found: object, path: str | None) -> None:
    from .report import plain

    if path:
        Path(path).write_text(json.dumps(plain(found), indent=1) + "\n")
