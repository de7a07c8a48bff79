"""What is left of a run: its files, and the one table that is printed last."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..bench import report as bench_report
from ..bench.floors import Ceilings
from ..bench.rows import Run
from ..measure.text import dtype_name
from .outcome import Outcome
from .plan import DTYPES
from .proofs import Finding

MOST_LINES = 12  # of failures in the table; the files have them all
_WIDEST = 200  # characters of one failure


_IN_ENVIRONMENT = ("problems", "seconds", "notes", "launches", "able", "stuck")


def expect_folder(folder: Path) -> None:
    """Makes a folder if need be; raises OSError if nothing can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "environment.json", "{}")


def save(outcome: Outcome, folder: Path) -> None:
    """Write all files but the picture. It is quick, and each file is whole even if this process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(outcome, name) for name in _IN_ENVIRONMENT}
    measured = None if outcome.ceilings is None else outcome.ceilings._asdict()
    _write_json(folder / "environment.json", outcome.environment | kept | {"ceilings": measured})
    _write_json(folder / "parity.json", [dataclasses.asdict(each) for each in outcome.findings])
    _write_json(folder / "bench.json", outcome.bench.as_dict())
    _write_json(folder / "configs.json", outcome.configs)
    _write_json(folder / "kernels.json", outcome.kernels)
    _write(folder / "build.txt", outcome.build)
    table = bench_report.markdown(outcome.bench)
    _write(folder / "summary.md", f"# {_title(outcome)}\n\n```\n{summary(outcome)}\n```\n\n{table}\n")


def draw(outcome: Outcome, folder: Path) -> None:
    """Write bench.png, where matplotlib is and something was timed."""
    (folder / "bench.png").unlink(missing_ok=True)  # that of an earlier run
    if outcome.bench.rows:
        with suppress(ImportError):
            bench_report.picture(outcome.bench, folder / "bench.png")


def load(folder: Path) -> Outcome:
    """Read what `save` wrote.

    Raises:
        OSError: a file is not there.
        ValueError: the files are of something else.
    """
    try:
        environment = _read_json(folder / "environment.json")
        measured = environment.pop("ceilings")
        kept = {name: environment.pop(name) for name in _IN_ENVIRONMENT if name in environment}
        return Outcome(
            environment,
            [Finding(**each) for each in _read_json(folder / "parity.json")],
            ceilings=None if measured is None else Ceilings(**measured),
            bench=Run.load(folder / "bench.json"),
            configs=_read_json(folder / "configs.json"),
            kernels=_read_json(folder / "kernels.json"),
            build=(folder / "build.txt").read_text(),
            **kept,
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder}: expected what `gpu` has written, got files of something else."
        ) from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _write_json(path: Path, content: object) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text)
    draft.replace(path)


def summary(outcome: Outcome) -> str:
    """Everything that matters, in well under 12,000 characters."""
    parts = [
        [_title(outcome), *outcome.notes, _steps(outcome)],
        [
            "accuracy: the largest share of a budget of 2 x rounding + 1 ulp",
            *_accuracy(outcome.findings),
        ],
        _proofs(outcome.findings),
        _kernels(outcome),
        _launches(outcome),
        _bench(outcome),
        _failures(outcome.failures),
        [_verdict(outcome)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _title(outcome: Outcome) -> str:
    versions = outcome.environment["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "triton", "commit") if versions.get(name)]
    title = ", ".join([outcome.environment["device"], *named, outcome.environment["time"]])
    rehearsed = outcome.environment["on"] == "cpu"
    return f"A rehearsal, which says nothing about a GPU, on {title}" if rehearsed else title


def _steps(outcome: Outcome) -> str:
    return "seconds: " + ", ".join(f"{name} {taken:.0f}" for name, taken in outcome.seconds.items())


def _accuracy(findings: list[Finding]) -> list[str]:
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    lines = [_ACCURACY.format("operator", "backend", *dtypes)]
    groups: dict[tuple[str, str], dict[str, list[Finding]]] = {}
    for each in findings:
        if each.check == "parity":
            by_dtype = groups.setdefault((each.operator, each.backend), {})
            by_dtype.setdefault(each.dtype, []).append(each)
    for what, by_dtype in sorted(groups.items()):
        cells = [_cell(by_dtype.get(dtype, [])) for dtype in dtypes]
        lines.append(_ACCURACY.format(*what, *cells).rstrip())
    return lines


_ACCURACY = "{:<24} {:<18} {:<22} {:<22} {:<22}"


def _cell(findings: list[Finding]) -> str:
    failed = [each for each in findings if each.status == "failed"]
    if failed:
        return f"FAILED {len(failed)} of {len(findings)}"
    spent = [each.spent for each in findings if each.spent is not None]
    return f"{max(spent):.2f} ({_counted(findings)})" if spent else _counted(findings)


def _counted(findings: Iterable[Finding]) -> str:
    counts = Counter(each.status for each in findings)
    return ", ".join(f"{counts[name]} {name}" for name in ("ok", "failed", "skipped", "late") if counts[name])


def _proofs(findings: list[Finding]) -> list[str]:
    """One line for each proof but parity, with the reasons of what was skipped."""
    lines = []
    for check in dict.fromkeys(each.check for each in findings if each.check != "parity"):
        found = [each for each in findings if each.check == check]
        reasons = dict.fromkeys(each.detail for each in found if each.status == "skipped")
        lines.append(f"{check}: {_counted(found)}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return lines


def _launches(outcome: Outcome) -> list[str]:
    """One line: what a small call costs the host."""
    each = [
        f"{operator} " + " ".join(f"{backend} {spent:.1f}" for backend, spent in by_backend.items())
        for operator, by_backend in outcome.launches.items()
        if by_backend
    ]
    return ["microseconds of the host for a small forward call: " + ", ".join(each)] if each else []


def _kernels(outcome: Outcome) -> list[str]:
    """One line for each reason why kernels did not run, and for what could therefore not be timed."""
    reasons: dict[str, list[str]] = {}
    for operator, backend in sorted(outcome.existing - outcome.ran):
        able = outcome.able[operator][backend]
        why = "nothing of it ran" if able is True else str(able)
        reasons.setdefault(f"{backend}: {why}", []).append(operator)
    lines = [f"did not run: {why} ({', '.join(operators)})" for why, operators in reasons.items()]
    return lines + [f"not timed, as it has no kernel here: {shape}" for shape in outcome.dropped]


def _bench(outcome: Outcome) -> list[str]:
    reached = [f"this device reaches: {outcome.ceilings}"] if outcome.ceilings else []
    return reached + (
        [bench_report.brief(outcome.bench)] if outcome.bench.rows or outcome.bench.skipped else []
    )


def _failures(failures: list[str]) -> list[str]:
    if not failures:
        return []
    more = len(failures) - MOST_LINES
    return [
        "FAILED:",
        *(f"  {line[:_WIDEST]}" for line in failures[:MOST_LINES]),
        *([f"  and {more} more, all in the files"] if more > 0 else []),
    ]


def _verdict(outcome: Outcome) -> str:
    cases = outcome.bench.cases.items()
    judged = [each for key, rows in cases for each in bench_report.verdicts(key, rows)]
    met = sum(each.met for each in judged)
    existing, ran = outcome.existing, outcome.ran
    missing = outcome.late or outcome.dropped or ran != existing
    right = "nothing that ran is wrong, but not all ran" if missing else "all ran and is right"
    parts = ["FAILED" if outcome.failures else right]
    parts += [f"{len(ran)} of {len(existing)} kernels ran"] if existing else []
    parts += [f"{met} of {len(judged)} targets met"] if judged else []
    parts += [f"{outcome.late} not run for want of time"] if outcome.late else []
    return "; ".join(parts)
