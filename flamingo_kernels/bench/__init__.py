"""Times operators and layers against their rivals, after checking that they compute the same.

shapes     what is timed and what must be reached, as data
baselines  the contenders' calls
run        check, then time
timing     the clock: interleaved, medians and percentiles
memory     the peak of a call
rows       what is kept of a run
report     tables and the picture
"""

from __future__ import annotations

import argparse
import sys


def main(options: argparse.Namespace) -> int:
    """The command `bench`: 1 if a result of ours was wrong, 2 if there is nothing to run, else 0."""
    from .baselines import OURS
    from .report import picture, table, update_readme
    from .rows import Run
    from .run import ProgressBar, run
    from .shapes import CASES, QUICK

    if options.load:
        outcome = Run.load(options.load)
    else:
        every = QUICK if options.quick else CASES
        cases = [case for case in every if not options.op or case.op in options.op]
        if not cases:
            known = ", ".join(dict.fromkeys(case.op for case in every))
            print(f"bench: --op {' '.join(options.op)} is not one of {known}.", file=sys.stderr)
            return 2
        progress = ProgressBar(len(cases))
        seconds = options.seconds if options.seconds is not None else 0.1 if options.quick else 2.0
        outcome = run(cases, against=options.against or (), seconds=seconds, progress=progress)
        progress.close()
    print(table(outcome))
    if options.json:
        outcome.save_json(options.json)
    if options.csv:
        outcome.save_csv(options.csv)
    if options.readme:
        update_readme(outcome, options.readme)
    if options.picture:
        picture(outcome, options.picture)
    return int(any(each.refused and each.contender == OURS for each in outcome.skipped))
