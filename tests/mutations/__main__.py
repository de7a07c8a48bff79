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
from dataclasses import replace
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.scratch import Scratch

from .faults import Fault, read
from .forks import ForkingScratch
from .plant import OUTCOMES, Verdict, plant


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    faults = _chosen(read(), options.words)
    if not faults:
        print(f"mutate: no part, file or fault is called {' or '.join(options.words)}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copies = min(options.jobs, len(faults))
        print(f"{len(faults)} faults in {copies} copies", flush=True)
        scratches = [ForkingScratch(ROOT, Path(folder, str(n))) for n in range(copies)]
        verdicts = []
        for verdict in _verdicts(scratches, faults, stop_at_first=not options.killers):
            print(verdict, flush=True)
            verdicts.append(verdict)
        verdicts = _checked(scratches[0], verdicts)
    if options.killers:
        found = {str(each.fault): each.run.failed for each in verdicts}
        options.killers.write_text(json.dumps(found, indent=1))
    print(_summary(verdicts))
    return int(any(each.outcome in ("survived", "broken") for each in verdicts))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutate ARGS=...", description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="only these parts, or faults with this in their file or words",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies at work at once: one a core")
    parser.add_argument(
        "--killers",
        type=Path,
        help="run all tests of a fault, and write those that failed into this JSON file",
    )
    return parser.parse_args(arguments)


def _chosen(faults: Sequence[Fault], words: Sequence[str]) -> list[Fault]:
    parts = {fault.part for fault in faults}.intersection(words)
    texts = [word for word in words if word not in parts]
    return [
        fault
        for fault in faults
        if not words or fault.part in parts or any(text in str(fault) for text in texts)
    ]


def _checked(scratch: Scratch, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """What a test says of a fault means nothing if it fails without one too."""
    killers = {
        test
        for each in verdicts
        for test in each.run.failed
        if (scratch.folder / test.partition("::")[0]).exists()
    }
    harmless = set(scratch.test(*sorted(killers)).failed)
    broken = "also fails without a fault"
    return [
        replace(each, outcome="broken", run=replace(each.run, tail=broken))
        if each.outcome == "killed" and harmless.issuperset(each.run.failed)
        else each
        for each in verdicts
    ]


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
            return plant(scratch, fault, stop_at_first=stop_at_first)
        finally:
            free.put(scratch)

    with ThreadPoolExecutor(len(scratches)) as pool:
        for done in as_completed([pool.submit(judge, fault) for fault in faults]):
            yield done.result()


def _summary(verdicts: Sequence[Verdict]) -> str:
    """A line for each part, and what was not found."""
    lines = ["", f"{'part':<12} {'faults':>6} " + " ".join(f"{outcome:>10}" for outcome in OUTCOMES)]
    for part in [*sorted({each.fault.part for each in verdicts}), "all"]:
        counts = Counter(each.outcome for each in verdicts if part in (each.fault.part, "all"))
        numbers = " ".join(f"{counts[outcome]:>10}" for outcome in OUTCOMES)
        lines.append(f"{part:<12} {counts.total():>6} {numbers}")
    lines += [f"{each.outcome}: {each.fault}" for each in verdicts if each.outcome in ("survived", "broken")]
    visible = [each for each in verdicts if each.outcome != "equivalent"]
    share = sum(each.outcome == "killed" for each in visible) / max(len(visible), 1)
    return "\n".join([*lines, f"{share:.1%} of the faults that a test can see were found"])


if __name__ == "__main__":
    sys.exit(main())
