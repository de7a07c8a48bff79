"""Plants one fault in a copy of the project, and runs its tests."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

from tests.helpers.scratch import FAILED, PASSED, Run, Scratch

from .faults import Fault

Outcome = Literal["killed", "survived", "equivalent", "broken"]
OUTCOMES: tuple[Outcome, ...] = ("killed", "survived", "equivalent", "broken")


@dataclass(frozen=True)
class Verdict:
    """What became of a fault; "broken" is one that cannot be planted, has no tests, or is no equivalent."""

    fault: Fault
    outcome: Outcome
    run: Run

    def __str__(self) -> str:
        by = self.run.failed[0] if self.run.failed else self.fault.equivalent or self.run.tail.strip()[-300:]
        return f"{self.outcome:<10} {self.fault}\n           {by}  ({self.run.seconds:.0f} s)"


def plant(scratch: Scratch, fault: Fault, *, stop_at_first: bool = True) -> Verdict:
    """Plant a fault, compile what it is in, run its tests, and take it out again."""
    arguments = [
        *(["-x"] if stop_at_first else []),
        *fault.tests,
        *(["-k", fault.only] if fault.only else []),
    ]
    try:
        with contextlib.ExitStack() as stack:
            text = fault.planted((scratch.folder / fault.path).read_text())
            stack.enter_context(scratch.edited(fault.path, text))
            environment = {}
            if fault.path.startswith("csrc/"):
                emulate = {"FLAMINGO_KERNELS_EMULATE": "1"} if fault.emulate else {}
                cpu, cuda = (not fault.path.startswith(f"csrc/{other}/") for other in ("cuda", "cpu"))
                environment = stack.enter_context(scratch.compiled(cpu=cpu, cuda=cuda, **emulate))
            run = scratch.test(*arguments, **environment)
    except (RuntimeError, ValueError) as error:
        return Verdict(fault, "broken", Run(-1, [], str(error), 0))
    return Verdict(fault, *_judge(fault, run))


def _judge(fault: Fault, run: Run) -> tuple[Outcome, Run]:
    if run.status == PASSED:
        return "equivalent" if fault.equivalent else "survived", run
    if fault.equivalent:
        return "broken", replace(run, failed=[], tail=f"is called equivalent, but {run.failed} saw it")
    # Tests that can no longer be collected have seen it too; a selection of no tests has not.
    return "killed" if run.failed or run.status == FAILED else "broken", run
