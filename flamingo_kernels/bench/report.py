"""Shows a run: a table for the terminal, one for the README, and a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .baselines import OURS
from .rows import Key, Row, Run, Skipped
from .shapes import CASES, FLAT_MEMORY, Target

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
RIVALS = ("eager", "sdpa", "compile", "torch.add")


class Verdict(NamedTuple):
    """A target, the ratio that was measured, and whether it is enough."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.target.ratio

    def __str__(self) -> str:
        return f"{self.target}: {'met' if self.met else 'not met'} ({_times(self.ratio)})"


def verdicts(key: Key, rows: dict[str, Row]) -> list[Verdict]:
    """The targets of a case whose contenders all have a row."""
    targets = next(
        (case.targets for case in CASES if key == (case.op, case.shape, case.dtype, case.mode)), ()
    )
    return [
        Verdict(target, min(rows[name].ratio for name in target.against))
        for target in targets
        if all(name in rows for name in target.against)
    ]


def memory_verdict(run: Run) -> str:
    """Whether ours takes the same extra memory at every shape, or "" where less than two were measured."""
    found = {
        rows[OURS].shape: rows[OURS].extra_mib
        for key, rows in run.cases.items()
        if (key.op, key.dtype, key.mode) == FLAT_MEMORY.case
    }
    sizes = [size for size in found.values() if size is not None]
    if len(sizes) < 2:
        return ""
    met = max(sizes) - min(sizes) <= FLAT_MEMORY.tolerance_mib
    listed = ", ".join(f"{size:.1f} MiB at {shape}" for shape, size in found.items())
    return f"extra memory of {' '.join(FLAT_MEMORY.case)} does not grow with T * M: {_met(met)} ({listed})"


def table(run: Run) -> str:
    """Every row, grouped by case, for the terminal."""
    lines: list[str] = []
    for key, rows in run.cases.items():
        lines += ["  ".join(key)]
        lines += [_line(row) for row in sorted(rows.values(), key=_order)]
        lines += [f"    at least {verdict}" for verdict in verdicts(key, rows)]
        lines += [f"    {each.contender:<17} {_reason(each)}" for each in run.skipped if each.key == key]
        lines += [""]
    lines += [f"{' '.join(each.key)}: {each.contender} {_reason(each)}" for each in _without_case(run)]
    return "\n".join([*lines, *filter(None, [memory_verdict(run), conditions(run)])])


def markdown(run: Run) -> str:
    """One line a case, for the README."""
    lines = [
        "| | dtype | mode | ours | eager | SDPA | compile | at least |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for key, rows in run.cases.items():
        cells = [f"`{key.op}` {key.shape}", key.dtype, key.mode, _milliseconds(rows[OURS].median_ms)]
        cells += [_times(rows[name].ratio) if name in rows else "-" for name in RIVALS[:3]]
        cells.append("<br>".join(map(str, verdicts(key, rows))))
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        "Columns of rivals: how many times as long as ours they take. "
        "A dash: no such rival, or it was left out (no compiler, or a wrong result).",
        memory_verdict(run),
        conditions(run),
    ]
    return "\n".join([*lines, "", "\n\n".join(filter(None, notes))])


def conditions(run: Run) -> str:
    """What the numbers were measured on."""
    if not run.rows:
        return ""
    ours = {row.variant for row in run.rows if row.contender == OURS}
    row = run.rows[0]
    commit = f", commit {row.commit}" if row.commit else ""
    return (
        f"Medians on {row.device}, {row.threads} threads, torch {row.torch}, backend "
        f"{', '.join(sorted(ours))}{commit}, {row.time}."
    )


def update_readme(run: Run, path: str | Path) -> None:
    """Replace what stands between the two markers of a file by the table.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    text = Path(path).read_text()
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected one {BEGIN!r} and after it one {END!r}.")
    before, rest = text.split(BEGIN)
    Path(path).write_text(f"{before}{BEGIN}\n\n{markdown(run)}\n\n{END}{rest.split(END)[1]}")


def picture(run: Run, path: str | Path) -> None:
    """Draw how many times as long as ours the rivals take.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install flamingo-kernels[bench]") from error

    cases = list(run.cases.items())[::-1]  # barh draws upwards
    rivals = [name for name in RIVALS if any(name in rows for _, rows in cases)]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    thickness = 0.8 / len(rivals)
    for i, name in enumerate(rivals):
        height = [y + 0.4 - thickness * (i + 0.5) for y in range(len(cases))]
        ratios = [rows[name].ratio if name in rows else 1 for _, rows in cases]
        bars = axes.barh(height, [r - 1 for r in ratios], thickness, left=1, color=_COLOURS[name], label=name)
        labels = [_times(rows[name].ratio) if name in rows else "" for _, rows in cases]
        axes.bar_label(bars, labels, padding=3, fontsize=7, color="#444444")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [_label(key) for key, _ in cases], fontsize=8)
    axes.set_xlabel("times as long as flamingo_kernels (to the right of 1 ours is faster)", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(conditions(run), fontsize=7, color="#666666", loc="left")
    figure.savefig(path, dpi=160)


_COLOURS = {"eager": "#c8553d", "sdpa": "#588b8b", "compile": "#f28f3b", "torch.add": "#93b7be"}


def _label(key: Key) -> str:
    shape = re.sub(r" (H|d|R)\d+", "", key.shape)
    return f"{key.op}  {shape}\n{key.dtype}, {key.mode}"


def _order(row: Row) -> tuple[bool, float]:
    """Ours first, then from the fastest on."""
    return row.contender != OURS, row.median_ms


def _line(row: Row) -> str:
    time = f"{_milliseconds(row.median_ms):>10} ({row.p20_ms:.4g} to {row.p80_ms:.4g})"
    error = "a floor, not compared" if row.err is None else f"error {row.err:.1e} of {row.budget:.1e}"
    memory = "" if row.extra_mib is None else f"{row.extra_mib:.1f} MiB"
    cells = [f"{row.contender:<17}", f"{time:<32}", f"{_times(row.ratio):>7}", f"{memory:>10}", error]
    return "    " + "  ".join([*cells, row.variant]).rstrip()


def _reason(skipped: Skipped) -> str:
    return f"{'REFUSED' if skipped.refused else 'skipped'}: {skipped.reason}"


def _without_case(run: Run) -> list[Skipped]:
    return [each for each in run.skipped if each.key not in run.cases]


def _met(met: bool) -> str:
    return "met" if met else "not met"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"
