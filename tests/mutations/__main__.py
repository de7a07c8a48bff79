"""`python -m tests.mutations`: plant every fault, run its tests, and say which were found."""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers import ROOT

from .faults import Fault, read
from .scratch import FAILED, PASSED, Run, Scratch

KILLED, SURVIVED, EQUIVALENT, BROKEN = "killed", "survived", "equivalent", "broken"


@dataclass(frozen=True)
class Verdict:
    """What became of a fault, and by which tests."""

    fault: Fault
    verdict: str
    run: Run

    def __str__(self) -> str:
        by = self.run.failed[0] if self.run.failed else self.fault.equivalent or self.run.tail.strip()[-300:]
        return f"{self.verdict:<10} {self.fault}\n           {by}  ({self.run.seconds:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    faults = [fault for fault in read() if options.filter in f"{fault.part} {fault}"]
    if not faults:
        print(f"mutate: no fault has {options.filter!r} in its part, file or words.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        scratches = [Scratch(ROOT, Path(folder, str(n))) for n in range(min(options.jobs, len(faults)))]
        print(
            f"{len(faults)} faults in {len(scratches)} copies; first their tests without a fault", flush=True
        )
        if not _pass_unharmed(scratches[0], faults):
            return 2
        verdicts = []
        for verdict in _verdicts(scratches, faults, stop_at_first=not options.killers):
            print(verdict, flush=True)
            verdicts.append(verdict)
    if options.killers:
        found = {str(each.fault): each.run.failed for each in verdicts}
        options.killers.write_text(json.dumps(found, indent=1))
    print(_summary(verdicts))
    return int(any(each.verdict in (SURVIVED, BROKEN) for each in verdicts))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutate ARGS=...", description=__doc__)
    parser.add_argument(
        "filter", nargs="?", default="", help="only faults with this in their part, file or words"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies at work at once: one a core")
    parser.add_argument(
        "--killers",
        type=Path,
        help="run all tests of a fault, and write those that failed into this JSON file",
    )
    return parser.parse_args(arguments)


def _pass_unharmed(scratch: Scratch, faults: Iterable[Fault]) -> bool:
    """Whether all tests pass as things are: else nothing that they say of a fault means anything."""
    run = scratch.test("-x", *sorted({test for fault in faults for test in fault.tests}))
    if run.status != PASSED:
        print(f"the tests fail without a fault:\n{run.tail}", file=sys.stderr)
    return run.status == PASSED


def _verdicts(
    scratches: Sequence[Scratch], faults: Sequence[Fault], *, stop_at_first: bool
) -> Iterable[Verdict]:
    """In the order in which they are known; every copy takes the next fault when it has done one."""
    free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
    for scratch in scratches:
        free.put(scratch)

    def judge(fault: Fault) -> Verdict:
        scratch = free.get()
        try:
            return try_out(scratch, fault, stop_at_first=stop_at_first)
        finally:
            free.put(scratch)

    with ThreadPoolExecutor(len(scratches)) as pool:
        for done in as_completed([pool.submit(judge, fault) for fault in faults]):
            yield done.result()


def try_out(scratch: Scratch, fault: Fault, *, stop_at_first: bool = True) -> Verdict:
    """Plant a fault and run its tests."""
    arguments = [
        *(["-x"] if stop_at_first else []),
        *fault.tests,
        *(["-k", fault.only] if fault.only else []),
    ]
    try:
        with scratch.planted(fault) as environment:
            run = scratch.test(*arguments, **environment)
    except (RuntimeError, ValueError) as error:
        return Verdict(fault, BROKEN, Run(-1, [], str(error), 0))
    if run.status == PASSED:
        return Verdict(fault, EQUIVALENT if fault.equivalent else SURVIVED, run)
    if fault.equivalent:
        tail = f"is called equivalent, but {run.failed} saw it"
        return Verdict(fault, BROKEN, replace(run, failed=[], tail=tail))
    # Tests that cannot be collected any more have seen it too; a selection of no tests has not.
    return Verdict(fault, KILLED if run.failed or run.status == FAILED else BROKEN, run)


def _summary(verdicts: Sequence[Verdict]) -> str:
    """A line for each part, and what was not found."""
    lines = ["", f"{'part':<12} {'faults':>6} {KILLED:>8} {SURVIVED:>9} {EQUIVALENT:>11} {BROKEN:>7}"]
    parts = sorted({each.fault.part for each in verdicts})
    for part in [*parts, "all"]:
        counts = Counter(each.verdict for each in verdicts if part in (each.fault.part, "all"))
        lines.append(
            f"{part:<12} {counts.total():>6} {counts[KILLED]:>8} {counts[SURVIVED]:>9} "
            f"{counts[EQUIVALENT]:>11} {counts[BROKEN]:>7}"
        )
    left = [each for each in verdicts if each.verdict in (SURVIVED, BROKEN)]
    lines += [f"{each.verdict}: {each.fault}" for each in left]
    mortal = [each for each in verdicts if each.verdict != EQUIVALENT]
    share = sum(each.verdict == KILLED for each in mortal) / max(len(mortal), 1)
    return "\n".join([*lines, f"{share:.1%} of the faults that a test can see were found"])


if __name__ == "__main__":
    sys.exit(main())
