"""Times operators and layers against their rivals, after checking that they compute the same.

shapes     what is timed and what must be reached, as data
asked      which cases the options ask for, of this library's shapes or the user's
baselines  the contenders' calls
rival      a contender of the user's own
run        check, then time
floors     the bytes a call must move, and how fast the device moves bytes
rows       what is kept of a run
report     tables and the picture
"""

from __future__ import annotations

import argparse
import sys
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo.command_line import MOST_THREADS, count_from, expect_writable, time_span

if TYPE_CHECKING:
    from .rows import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help=f"only this operator or layer, or those with this in their name (repeatable): {_operators()}",
    )
    parser.add_argument(
        "--against", action="append", metavar="NAME", help=f"only this rival (repeatable): {_rivals()}"
    )
    parser.add_argument(
        "--rival",
        action="append",
        metavar="FILE.py:NAME|MODULE:NAME",
        help="also a function of yours, which is called with the operator's arguments, or with the layer and "
        "its, and returns the same (repeatable)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SIZES",
        help='instead of the built-in shapes, as "B2 T512 M4 H16 d80 R64", of the operators that have these '
        f"dimensions (repeatable): {_dimensions()}",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16", "float16"),
        help="only this dtype (repeatable; default: float32 and bfloat16)",
    )
    parser.add_argument(
        "--threads", type=count_from(1, MOST_THREADS), help="of the cpu (default: as torch chooses)"
    )
    parser.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it works, not how fast")
    parser.add_argument(
        "--seconds", type=time_span, help="how long to time one case (default: 2; 0.1 if quick)"
    )
    parser.add_argument(
        "--load",
        metavar="FILE",
        action="append",
        help="show an earlier --json FILE instead of running (repeatable: the later replaces a case)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every row with its conditions, case by case")
    parser.add_argument("--csv", metavar="FILE", help="write the rows for a spreadsheet, case by case")
    parser.add_argument("--picture", metavar="FILE", help="draw the speed-ups (.png, .svg, .pdf)")
    parser.add_argument("--markdown", metavar="FILE", help="write one line a case, as a table in Markdown")


def _operators() -> str:
    from .shapes import CASES_OF

    return "; ".join(dict.fromkeys(case.op for cases in CASES_OF.values() for case in cases))


def _dimensions() -> str:
    from .asked import takes
    from .shapes import DIMENSIONS

    return "; ".join(f"{op} {takes(op)}" for op in DIMENSIONS)


def _rivals() -> str:
    from .report import RIVALS

    return ", ".join(RIVALS)


def main(options: argparse.Namespace) -> int:
    """The command `bench`: 1 if a result of ours was wrong, else 0.

    Raises:
        ImportError, OSError, ValueError: before the work, for what it cannot do or write.
        KeyboardInterrupt: by Ctrl-C, after what was timed until then is shown and written.
    """
    from ..measure.figure import expect_picture
    from .baselines import OURS
    from .run import Stopped

    if options.picture:
        expect_picture(options.picture)
    expect_writable(options.json, options.csv, options.markdown, options.picture)
    try:
        outcome = _load_or_run(options)
    except Stopped as stopped:
        _show(stopped.found, options)
        raise
    _show(outcome, options)
    return int(any(each.refused and each.contender == OURS for each in outcome.skipped))


def _show(outcome: Run, options: argparse.Namespace) -> None:
    """Writes what is asked for, then prints, as nobody may read that any more."""
    from .report import markdown, picture, table

    _save(outcome, options)
    if options.markdown and outcome.rows:
        Path(options.markdown).write_text(f"{markdown(outcome)}\n")
    if options.picture and outcome.rows:
        picture(outcome, options.picture)
    print(table(outcome))


def _save(outcome: Run, options: argparse.Namespace) -> None:
    """Writes over an earlier run only where there is something of this one."""
    if not (outcome.rows or outcome.skipped):
        return
    if options.json:
        outcome.save_json(options.json)
    if options.csv:
        outcome.save_csv(options.csv)


def _load_or_run(options: argparse.Namespace) -> Run:
    import torch

    from ..info import expect_device, tell_of_no_kernels
    from ..measure.progress import ProgressBar
    from . import asked, rival
    from .floors import ceilings
    from .rows import Run
    from .run import run
    from .shapes import CASES_OF, QUICK

    if options.load:
        return reduce(Run.updated, map(Run.load, options.load))
    expect_device(options.device)
    device = torch.device(options.device)
    _expect_rivals(options)
    every = QUICK if options.quick else CASES_OF[device.type]
    wanted = options.op or [], options.shape or [], options.dtype or []
    cases = asked.cases(every, *wanted, device=options.device)
    rivals = rival.rivals(options.rival or [], dict.fromkeys(case.op for case in cases))
    seconds = options.seconds if options.seconds is not None else 0.1 if options.quick else 2.0
    reached = None
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        reached = ceilings(options.device)
    else:
        _warn_if_busy()
    tell_of_no_kernels("bench")
    progress = ProgressBar(len(cases), seconds)
    try:
        return run(
            cases,
            against=options.against or [],
            rivals=rivals,
            seconds=seconds,
            progress=progress,
            keep=lambda found: _save(found, options),
            device=options.device,
            ceilings=reached,
        )
    finally:
        progress.close()


def _expect_rivals(options: argparse.Namespace) -> None:
    from .report import RIVALS

    for name in options.against or []:
        if name not in RIVALS:
            raise ValueError(f"--against {name} is not one of {', '.join(RIVALS)}.")
    if options.rival and not (options.op or options.shape):
        raise ValueError("expected --op NAME with --rival, which computes what that does.")


def _warn_if_busy() -> None:
    from ..measure.busy import QUIET, busy_cores

    busy = busy_cores()
    if busy is not None and busy > QUIET:
        print(
            f"bench: others keep {busy:.1f} cores of this machine busy: times are longer than on a quiet "
            "one, and ratios are less certain.",
            file=sys.stderr,
        )
