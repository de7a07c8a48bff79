"""Runs the steps of a plan in order: one that fails or hangs stops none of the others, and each is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ..._backends import cuda, dispatch, env
from ...testing import CASES
from .. import check, info
from ..bench.rows import Run
from ..bench.run import prepare, without
from ..bench.shapes import Case
from ..measure.text import first_line
from ..measure.timing import Clock
from . import sanitizer, work
from .build import Building
from .crew import Crew, Lost
from .outcome import NO_KERNEL, NO_TIME, Outcome
from .plan import Plan, tasks
from .proofs import Finding, Task, perform
from .work import Rows

_UTC = "%Y-%m-%dT%H:%M:%SZ"


def run(
    plan: Plan,
    device: str,
    *,
    workers: int = 0,
    building: Building | str = "",
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[Outcome], None] = lambda outcome: None,
    clock: Clock | None = None,
) -> Outcome:
    """Run the steps of a plan.

    Args:
        plan: what, and for how long.
        device: where.
        workers: processes that do what needs the device, so that it cannot hold this one; 0 to do all here.
        building: a build of the CUDA kernels that goes on, or why there is none.
        say: told what is going on.
        save: given all that was found, after every step and every timed shape.
        clock: what keeps the time of benchmarks; the device's own by default.
    """
    with Crew(workers) as crew:
        steps = _Steps(plan, device, crew, building, say, save, clock)
        for name in plan.steps:
            steps.take(name)
    if crew.stuck:
        steps.outcome.stuck = True
        steps.keep()
    return steps.outcome


class _Proofs(NamedTuple):
    """A step of proofs."""

    proofs: tuple[str, ...]
    cases: str  # of the plan
    dtypes: int | None = None  # how many of the plan's, if not all
    most: int | None = None  # tasks at once, if not as many as there are workers


_PROOFS = {
    "parity": _Proofs(("parity",), "cases"),
    "more parity": _Proofs(("parity",), "cases"),
    "determinism": _Proofs(("repeats", "another stream", "another device"), "repeated"),
    "graphs": _Proofs(("graph",), "repeated"),
    "large": _Proofs(("past 2^31 elements",), "large", dtypes=1, most=1),
}


class _Steps:
    """One run: its steps, and what they leave behind."""

    def __init__(
        self,
        plan: Plan,
        device: str,
        crew: Crew,
        building: Building | str,
        say: Callable[[str], None],
        save: Callable[[Outcome], None],
        clock: Clock | None,
    ) -> None:
        self.plan, self.device, self.crew, self.building = plan, device, crew, building
        self.say, self.save, self.clock = say, save, clock
        self.due = time.monotonic()  # when the step must end, if those before it have left nothing over
        self.end = self.due + plan.seconds
        versions = {"torch": torch.__version__}
        now = time.strftime(_UTC, time.gmtime())
        named = {"device": info.device_name(device), "on": device, "time": now, "versions": versions}
        self.outcome = Outcome(named)
        self.backends: dict[str, tuple[str, ...]] = {}  # that run here, by operator

    def take(self, name: str) -> None:
        """One step; the others go on when it fails, and what it found is saved either way."""
        began = time.monotonic()
        self.say(name)
        self.due += self.plan.steps[name].step
        try:
            if name in _PROOFS:
                self.prove(name)
            else:
                getattr(self, name)()
        except Exception as error:
            self.outcome.problems[name] = first_line(error)
        self.outcome.seconds[name] = round(time.monotonic() - began, 1)
        self.keep()

    def keep(self) -> None:
        """Save what there is; a disk that is full must not end the run."""
        try:
            self.save(self.outcome)
        except OSError as error:
            self.outcome.problems["files"] = first_line(error)

    def share(
        self, name: str, do: Callable[[Any], Any], every: Iterable[Any], most: int | None = 1
    ) -> Iterator[tuple[Any, Any]]:
        """The tasks of a step with their results; what is timed has the device for itself."""
        end, each = min(self.end, self.due), self.plan.steps[name].task
        results = self.crew.share(do, every, end=end, each=each, most=most)
        for done, result in enumerate(results, start=1):
            if done % 50 == 0:
                self.say(f"{name}: {done}")
            yield result

    def rivals(self) -> None:
        """Compile for the rivals side by side: it is on disk when they are timed one by one."""
        names = [name for name in ("compile", "flex") if not self.plan.against or name in self.plan.against]
        ahead = [(case, name, self.device) for case in self.plan.timed for name in names]
        for _ in self.share("rivals", prepare, ahead, most=None) if self.crew.workers else ():
            pass

    def build(self) -> None:
        """Wait for the CUDA kernels, and see which kernels there are."""
        building, outcome = self.building, self.outcome
        note = building if isinstance(building, str) else building.finish(min(self.end, self.due))
        if note:
            self.say(note)
            outcome.notes.append(note)
        if not isinstance(building, str):
            outcome.build = building.log.read_text(errors="replace")
        on_gpu = torch.device(self.device).type == "cuda"
        for operator in dispatch.operators():
            able = check.backends_on(self.device, operator)
            wanted = [name for name in self.plan.backends if name in dispatch.limits(operator)]
            able = {name: able[name] for name in wanted if name in able and not (on_gpu and name == "cpu")}
            outcome.able[operator] = able
            self.backends[operator] = tuple(name for name, yes in able.items() if yes is True)
        self._miss()
        outcome.environment |= info.collect()

    def _miss(self) -> None:
        """Note each kernel that should run here and does not."""
        on_gpu = torch.device(self.device).type == "cuda"
        should = {"triton"} if on_gpu or env.INTERPRET else {"cpu"}
        if not isinstance(self.building, str) or (on_gpu and cuda.build()):
            should.add("cuda")
        for operator, able in self.outcome.able.items():
            for backend in sorted(should & able.keys()):
                if able[backend] is not True:
                    self.outcome.problems[f"{operator}, {backend}"] = f"it does not run here: {able[backend]}"

    def prove(self, name: str) -> None:
        """A step of proofs."""
        for task, found in self.share(name, perform, self._tasks(name), most=_PROOFS[name].most):
            lost = isinstance(found, Lost)
            self.outcome.findings.append(task.finding(found.status, found.why) if lost else found)

    def _tasks(self, name: str) -> list[Task]:
        plan, step = self.plan, _PROOFS[name]
        cases, dtypes = getattr(plan, step.cases), plan.dtypes[: step.dtypes]
        first, alone = cases[: plan.first], dict.fromkeys(self.backends, ("reference",))
        if name == "parity":
            return tasks(name, first, self.backends, self.device, dtypes[:1]) + tasks(
                name, first, alone, self.device, dtypes[:1]
            )
        every = [
            task for proof in step.proofs for task in tasks(proof, cases, self.backends, self.device, dtypes)
        ]
        if name == "more parity":  # on the reference, a check of the check
            done = set(self._tasks("parity"))
            every = [*every, *tasks("parity", first, alone, self.device, dtypes)]
            every = [task for task in every if task not in done]
        return every

    def sanitizer(self) -> None:
        """The sanitizer's tools, side by side."""
        backends = tuple(dict.fromkeys(name for names in self.backends.values() for name in names))
        end = min(self.end, self.due)
        every = [sanitizer.Inspection(tool, self.device, backends, end) for tool in sanitizer.TOOLS]
        for inspection, found in self.crew.share(sanitizer.inspect, every, end=end + 5):  # it ends itself
            if isinstance(found, Lost):
                found = sanitizer.finding(inspection, found.status, found.why)
            self.outcome.findings.append(found)

    def floors(self) -> None:
        """What the device reaches."""
        for _, found in self.share("floors", partial(work.floors, clock=self.clock), [self.device]):
            if isinstance(found, Lost):
                self.outcome.findings.append(
                    Finding("floors", "copy, product", "torch", "all", "large", found.status, found.why)
                )
            else:
                self.outcome.ceilings = found

    def launches(self) -> None:
        """What a small call of every operator costs the host."""
        every = [
            Task("launches", CASES[operator](device=self.device, dtype=self.plan.dtypes[0]), backend)
            for operator, backends in self.backends.items()
            for backend in backends
        ]
        for task, found in self.share("launches", work.host, every):
            if isinstance(found, Lost):
                self.outcome.findings.append(task.finding(found.status, found.why))
            else:
                self.outcome.launches.setdefault(task.case.operator, {})[task.backend] = round(found, 1)

    def bench(self) -> None:
        """Every rival of every shape, until the time is over."""
        able = [case for case in self.plan.timed if self.backends.get(case.op, True)]
        for case in self.plan.timed:
            if case not in able:
                self._add(without(case, NO_KERNEL))
        do = partial(
            work.time,
            device=self.device,
            against=self.plan.against,
            seconds=self.plan.seconds_each,
            clock=self.clock,
            ceilings=self.outcome.ceilings,
        )
        for case, found in self.share("bench", do, able):
            if isinstance(found, Lost):
                found = without(case, NO_TIME if found.status == "late" else found.why)
            else:
                self.say(f"bench: {case}")
            self._add(found)
            self.keep()

    def _add(self, found: Run) -> None:
        bench = self.outcome.bench
        self.outcome.bench = Run(bench.rows + found.rows, bench.skipped + found.skipped)

    def configs(self) -> None:
        """Every way to launch every Triton kernel: all compiled side by side, then timed one by one."""
        every = [(case, "triton") for case in self._calls() if "triton" in self.backends[case.op]]
        ahead = partial(work.compile_configs, device=self.device)
        for _ in self.share("configs", ahead, every, most=None) if self.crew.workers else ():
            pass
        self._measure("configs", partial(work.time_configs, device=self.device, clock=self.clock), every)

    def kernels(self) -> None:
        """The time of every kernel in a call."""
        every = [(case, backend) for case in self._calls() for backend in self.backends[case.op]]
        self._measure("kernels", partial(work.profile, device=self.device), every)

    def _calls(self) -> list[Case]:
        """The timed shapes that are of operators, each once, with its gradients if it has any."""
        called = {(case.op, case.shape, case.dtype): case for case in self.plan.timed}
        return [case for case in called.values() if case.op in self.backends]

    def _measure(
        self, name: str, do: Callable[[tuple[Case, str]], Rows], every: list[tuple[Case, str]]
    ) -> None:
        """Rows of what `do` gives for each case and backend, and a finding that there are some."""
        rows: Rows = getattr(self.outcome, name)
        for (case, backend), found in self.share(name, do, every):
            status, why = ("ok", "") if found else ("skipped", "nothing could be seen of it")
            if isinstance(found, Lost):
                status, why = found.status, found.why
            else:
                rows += found
            what = (case.op, info.variant(backend), case.dtype, f"{case.shape} {case.mode}")
            self.outcome.findings.append(Finding(name, *what, status, why))
            self.keep()
