"""What one run of the demo found, and how it is told."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from flamingo.demo.digits import Kind
from flamingo.demo.lessons import Course
from flamingo.machine import counted, processor_name

TITLES: dict[Kind, str] = {
    "captions": "called by their names",
    "questions": "odd, even, small or large",
    "codes": "called by names of the document",
}


@dataclass
class Findings:
    """What one run of the demo found.

    Attributes:
        seed, threads: what it ran with.
        kernels: whether it learnt with the kernels, as `use_kernels` says.
        parameters: how many the Flamingo has.
        zero_shot: accuracy of the vision encoder alone, by contrast, on digits it has not seen.
        course: how the language model's lessons went.
        recall: how often the language model knows a number that was said before.
        knowledge: how often it knows whether something is true of a number.
        accuracy: by kind of document and number of shots, on digits never seen.
        difference: the largest relative one between the losses of the first steps, patched and not; None
            where nothing was patched.
        seconds: what each stage took.
    """

    seed: int = 0
    threads: int = 1
    kernels: str = ""
    parameters: int = 0
    zero_shot: float = 0.0
    course: Course = field(default_factory=Course)
    recall: float = 0.0
    knowledge: float = 0.0
    accuracy: dict[Kind, dict[int, float]] = field(default_factory=dict)
    difference: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def setting(self) -> str:
        """The model, and what it ran on today."""
        today = time.strftime("%Y-%m-%d", time.gmtime())
        return (
            f"A Flamingo of {self.parameters / 1e6:.2g} M parameters in float32, trained from nothing in "
            f"this run, seed {self.seed}\nCPU: {processor_name()}, {counted(self.threads, 'thread')}, "
            f"torch {torch.__version__}, {today}; {self.kernels}"
        )

    def missed(self) -> list[str]:
        """What it should have learnt and has not; nothing, as a rule.

        The limits stand between what models that look names up were measured to do (98 % of known names,
        89 % of drawn ones after eight shots, 73 points more than after none) and those that guess (33, 25).
        """
        names, codes = self.accuracy["captions"], self.accuracy["codes"]
        expected = [
            ("known names after no shot", names[0], 0.95),
            ("drawn names after 8 shots", codes[8], 0.80),
            ("drawn names after 8 shots more than after none", codes[8] - codes[0], 0.60),
        ]
        return [
            f"{what}: expected {least:.0%} right or more, got {share:.1%}."
            for what, share, least in expected
            if share < least
        ]

    def as_json(self) -> dict[str, Any]:
        """For `json.dump`: shares are of 1; accuracies by the number of shots."""
        by_shots = {
            kind: {str(shots): share for shots, share in shares.items()}
            for kind, shares in self.accuracy.items()
        }
        return {
            "drawn": by_shots["codes"],
            "known": by_shots["captions"],
            "questions": by_shots["questions"],
            "recall": self.recall,
            "facts": self.knowledge,
            "vision": self.zero_shot,
            "lessons": self.course.ends,
            "seed": self.seed,
            "threads": self.threads,
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """Accuracy by the number of shots, and the time."""
        lines = [
            "",
            "accuracy by the number of shots",
            f"{'shots':<34}" + "".join(f"{each:>8}" for each in self.accuracy["captions"]),
        ]
        for kind, title in TITLES.items():
            values = "".join(f"{value:>8.1%}" for value in self.accuracy[kind].values())
            lines.append(f"{title:<34}{values}")
        lines.append(f"in all {sum(self.seconds.values()):.0f} s")
        return "\n".join(lines)
