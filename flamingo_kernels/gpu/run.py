"""Runs the steps of a plan in order: one that fails stops none of the others, and each has its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .. import _dispatch, _env, check, info
from ..bench.baselines import OURS
from ..bench.floors import Ceilings, ceilings
from ..bench.rows import Run
from ..bench.run import NO_TIME, prepare
from ..bench.run import run as run_bench
from ..bench.timing import Clock
from ..testing import CASES
from . import sanitizer
from .build import Building
from .crew import Crew, Lost
from .launch import host_microseconds
from .plan import Plan, tasks
from .proofs import Finding, Task, perform


class _Step(NamedTuple):
    """A step of proofs."""

    proofs: tuple[str, ...]
    cases: str  # of the plan
    dtypes: int | None = None  # how many of the plan's, if not all
    most: int | None = None  # tasks at once, if not as many as there are workers


_PROOFS = {
    "parity": _Step(("parity",), "cases"),
    "determinism": _Step(("repeats", "another stream", "another device"), "repeated"),
    "graphs": _Step(("graph",), "repeated"),
    "large": _Step(("past 2^31 elements",), "large", dtypes=1, most=1),
}
_UTC = "%Y-%m-%dT%H:%M:%SZ"


@dataclass
class Outcome:
    """All that was found.

    Attributes:
        environment: of `info`, and the device, the time of day and the plan.
        findings: of every proof.
        problems: what kept a step from being done, by step.
        notes: what else is to be told.
        launches: microseconds of the host for a small call, by operator and backend.
        seconds: that each step took.
        ceilings: None where they were not measured.
        bench: every timed row.
    """

    environment: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    bench: Run = field(default_factory=lambda: Run([], []))
    notes: list[str] = field(default_factory=list)
    launches: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """One line for each thing that is not as it must be; a missed target is none."""
        proofs = [_line(each) for each in self.findings if each.status == "failed"]
        untimed = [
            f"bench {' '.join(each.key)}: {each.reason}"
            for each in self.bench.skipped
            if each.contender == OURS and each.reason != NO_TIME
        ]
        return [f"{step}: {why}" for step, why in self.problems.items()] + proofs + untimed


def _line(finding: Finding) -> str:
    what = f"{finding.check}, {finding.operator}, {finding.backend}, {finding.dtype}, {finding.case}"
    if finding.error is None:
        return f"{what}: {finding.detail}"
    return f"{what}: error of {finding.tensor} {finding.error:.2e}, budget {finding.budget:.2e}"


def run(
    plan: Plan,
    device: str,
    *,
    workers: int = 0,
    building: Building | str = "",
    say: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
) -> Outcome:
    """Prove first, then time. What rivals compile is compiled while the CUDA kernels are.

    Args:
        plan: what, and for how long.
        device: where.
        workers: processes that make the proofs side by side; 0 to make them in this one.
        building: a build of the CUDA kernels that goes on, or why there is none.
        say: told what is going on.
        clock: what keeps the time of benchmarks; the device's own by default.
    """
    gate = _Gate(plan, device, say)
    with Crew(workers) as crew:
        with gate.step("rivals") as end:
            gate.compile_rivals(crew, end)
        with gate.step("build") as end:
            gate.take_up(building, end)
        for name in _PROOFS:
            with gate.step(name) as end:
                gate.outcome.findings += gate.prove(name, crew, end)
        if plan.sanitizer:
            with gate.step("sanitizer") as end:
                gate.outcome.findings += gate.inspect(crew, end)
    with gate.step("floors"):
        gate.outcome.ceilings = ceilings(device, clock)
    with gate.step("launches") as end:
        gate.outcome.launches = gate.launches(end)
    with gate.step("bench") as end, _ours():
        gate.outcome.bench = gate.bench(clock, end)
    return gate.outcome


class _Gate:
    """One run: its steps, and what they leave behind."""

    def __init__(self, plan: Plan, device: str, say: Callable[[str], None]) -> None:
        self.plan, self.device, self.say = plan, device, say
        self.end = time.monotonic() + plan.seconds["all"]
        self.outcome = Outcome({})
        self.kernels: dict[str, tuple[str, ...]] = {}

    def take_up(self, building: Building | str, end: float) -> None:
        """Wait for the CUDA kernels, and see what there is to prove."""
        note = building if isinstance(building, str) else building.finish(end)
        if note:
            self.say(note)
            self.outcome.notes.append(note)
        named = {"device": info.device_name(self.device), "on": self.device}
        self.outcome.environment = info.collect() | named | {"time": time.strftime(_UTC, time.gmtime())}
        self.kernels = {operator: self._kernels(operator) for operator in _dispatch.operators()}

    def _kernels(self, operator: str) -> tuple[str, ...]:
        """The backends to be proved; that there is none is a problem where Triton should have one."""
        able = check.backends_on(self.device, operator)
        found = tuple(name for name, yes in able.items() if yes is True and name != "reference")
        if not found and "triton" in _dispatch.limits(operator):
            reasons = "; ".join(f"{name}: {why}" for name, why in able.items() if why is not True)
            self.outcome.problems[operator] = f"no kernel of ours runs here: {reasons}"
        return found

    @contextmanager
    def step(self, name: str) -> Iterator[float]:
        """Gives the time at which the step must end; the others go on when it fails."""
        began = time.monotonic()
        self.say(name)
        try:
            yield min(self.end, began + self.plan.seconds.get(name, math.inf))
        except Exception as error:
            self.outcome.problems[name] = f"{type(error).__name__}: {error}"
        self.outcome.seconds[name] = round(time.monotonic() - began, 1)

    def prove(self, name: str, crew: Crew, end: float) -> Iterator[Finding]:
        """The findings of a step of proofs."""
        step, every = _PROOFS[name], self._tasks(name)
        for done, (task, found) in enumerate(crew.share(perform, every, end=end, most=step.most), start=1):
            if done % 50 == 0:
                self.say(f"{name}: {done} of {len(every)}")
            yield task.finding(found.status, str(found)) if isinstance(found, Lost) else found

    def _tasks(self, name: str) -> list[Task]:
        plan, step = self.plan, _PROOFS[name]
        cases, dtypes = getattr(plan, step.cases), plan.dtypes[: step.dtypes]
        every = [
            task for proof in step.proofs for task in tasks(proof, cases, self.kernels, self.device, dtypes)
        ]
        if name == "parity":  # a check of the check
            alone = dict.fromkeys(self.kernels, ("reference",))
            every += tasks(name, cases[: len(check.CASES)], alone, self.device, dtypes)
        return every

    def inspect(self, crew: Crew, end: float) -> Iterator[Finding]:
        """The findings of the sanitizer's tools, side by side."""
        backends = tuple(dict.fromkeys(name for names in self.kernels.values() for name in names))
        every = [sanitizer.Inspection(tool, self.device, backends, end) for tool in sanitizer.TOOLS]
        for inspection, found in crew.share(sanitizer.inspect, every, end=end + 10):  # it ends itself
            if isinstance(found, Lost):
                found = sanitizer.finding(inspection, found.status, str(found))
            yield found

    def compile_rivals(self, crew: Crew, end: float) -> None:
        """What they compile here is on disk when they are timed, one after the other."""
        names = [name for name in ("compile", "flex") if not self.plan.against or name in self.plan.against]
        ahead = [(case, name, self.device) for case in self.plan.timed for name in names]
        for _ in crew.share(prepare, ahead, end=end) if crew.workers else ():
            pass

    def launches(self, end: float) -> dict[str, dict[str, float]]:
        """What a small call of every operator costs the host."""
        found: dict[str, dict[str, float]] = {}
        for operator, backends in self.kernels.items():
            case = CASES[operator](device=self.device, dtype=self.plan.dtypes[0])
            found[operator] = {
                backend: round(host_microseconds(case, backend), 1)
                for backend in backends
                if time.monotonic() < end
            }
        return found

    def bench(self, clock: Clock | None, end: float) -> Run:
        """Every rival of every shape, until the time is over."""
        torch.set_float32_matmul_precision("highest")  # no tf32
        return run_bench(
            [case for case in self.plan.timed if self.kernels.get(case.op, True)],
            against=self.plan.against,
            seconds=self.plan.seconds_each,
            progress=self.say,
            device=self.device,
            clock=clock,
            ceilings=self.outcome.ceilings,
            out_of_time=lambda: time.monotonic() > end,
        )


def _ours() -> AbstractContextManager[None]:
    """In Triton's interpreter our kernels run only where they are asked for by name."""
    return _dispatch.use_backend("triton") if _env.INTERPRET else nullcontext()
