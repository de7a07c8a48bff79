"""All that a run has found, and what of it is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..bench.baselines import OURS
from ..bench.floors import Ceilings
from ..bench.rows import Run
from .proofs import Finding

NO_TIME = "no time was left"
NO_KERNEL = "none of our kernels for it runs here"


@dataclass
class Outcome:
    """All that was found.

    Attributes:
        environment: what `info` says, and the device, the time of day and the plan.
        findings: of every proof and every measurement.
        problems: what kept a step from being done, by step.
        seconds: what each step took.
        ceilings: None where they were not measured.
        bench: every timed row.
        notes: what else is to be told.
        launches: microseconds of the host for a small call, by operator and backend.
        able: whether a kernel can run here, or why not, by operator and backend.
        configs: every configuration of the Triton kernels, timed and as it was compiled.
        kernels: the time of every kernel within a call.
        build: what the build of the CUDA kernels has printed.
        stuck: whether a process that was ended is still there, as the driver holds it.
    """

    environment: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    bench: Run = field(default_factory=lambda: Run([], []))
    notes: list[str] = field(default_factory=list)
    launches: dict[str, dict[str, float]] = field(default_factory=dict)
    able: dict[str, dict[str, bool | str]] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    build: str = ""
    stuck: bool = False

    @property
    def failures(self) -> list[str]:
        """One line for each failure; a missed target is none."""
        proofs = [_line(each) for each in self.findings if each.status == "failed"]
        untimed = [
            f"bench {' '.join(each.key)}: {each.reason}"
            for each in self.bench.skipped
            if each.contender == OURS and each.reason not in (NO_TIME, NO_KERNEL)
        ]
        idle = [
            f"{operator}, {backend}: nothing of it ran, though it can run here"
            for operator, backend in self._of(self.findings) - self.ran
            if self.able[operator][backend] is True
        ]
        stuck = ["a process that was ended is still there"] if self.stuck else []
        steps = [f"{step}: {why}" for step, why in self.problems.items()]
        return steps + stuck + sorted(idle) + proofs + untimed

    @property
    def existing(self) -> set[tuple[str, str]]:
        """The kernels that there are for this kind of device: operator and backend."""
        return {(operator, backend) for operator, backends in self.able.items() for backend in backends}

    @property
    def ran(self) -> set[tuple[str, str]]:
        """The kernels of which a proof or a measurement came to an end."""
        return self._of([each for each in self.findings if each.status in ("ok", "failed")])

    def _of(self, findings: list[Finding]) -> set[tuple[str, str]]:
        """The kernels that these findings are about."""
        return self.existing & {(each.operator, each.backend.partition("/")[0]) for each in findings}

    @property
    def late(self) -> int:
        """How many proofs and shapes there was no time for."""
        proofs = sum(each.status == "late" for each in self.findings)
        return proofs + sum(each.reason == NO_TIME for each in self.bench.skipped)

    @property
    def dropped(self) -> list[str]:
        """The shapes that no kernel of ours can run here."""
        return [" ".join(each.key) for each in self.bench.skipped if each.reason == NO_KERNEL]


def _line(finding: Finding) -> str:
    what = f"{finding.check}, {finding.operator}, {finding.backend}, {finding.dtype}, {finding.case}"
    if finding.error is None:
        return f"{what}: {finding.detail}"
    return f"{what}: error of {finding.tensor} {finding.error:.2e}, budget {finding.budget:.2e}"
