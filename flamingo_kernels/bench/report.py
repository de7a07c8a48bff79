"""Shows a run: a table for the terminal, one for the README, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .baselines import OURS
from .rows import Key, Row, Run, Skipped
from .shapes import CASES, FLAT_MEMORY, HEADS, Target

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
COLUMNS = ("eager", "sdpa", "compile")
RIVALS = (*COLUMNS, "torch.add")


class Verdict(NamedTuple):
    """A target, the ratio that was measured, and whether it is enough."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.target.ratio

    def __str__(self) -> str:
        # A floor is a ratio below 1, and reads better the other way round.
        measured = self.ratio if self.target.ratio > 1 else 1 / self.ratio
        return f"{self.target}: {_met(self.met)} ({_times(measured)})"


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
    return (
        f"Extra memory of our {' '.join(FLAT_MEMORY.case)} does not grow with T * M: {_met(met)} ({listed})"
    )


def table(run: Run) -> str:
    """Every row, grouped by case, for the terminal."""
    lines: list[str] = []
    for key, rows in run.cases.items():
        lines += ["  ".join(key)]
        lines += [_line(row) for row in sorted(rows.values(), key=_order)]
        lines += [f"    {verdict}" for verdict in verdicts(key, rows)]
        lines += [f"    {each.contender:<17} {_reason(each)}" for each in run.skipped if each.key == key]
        lines += [""]
    lines += [f"{' '.join(each.key)}: {each.contender} {_reason(each)}" for each in _without_case(run)]
    return "\n".join([*lines, *filter(None, [memory_verdict(run), conditions(run)])])


def markdown(run: Run) -> str:
    """One line a case, for the README."""
    lines = [
        "| | dtype | mode | ours | eager | SDPA | compile | target |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for key, rows in run.cases.items():
        cells = [f"`{key.op}` {_short(key.shape)}", key.dtype, key.mode, _milliseconds(rows[OURS].median_ms)]
        cells += [_times(rows[name].ratio) if name in rows else "-" for name in COLUMNS]
        cells.append("<br>".join(map(str, verdicts(key, rows))))
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"Columns of rivals: how many times as long as ours they take. Attention has{_USUAL}. "
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
    """Replace what stands between the two markers of a file by the table. Raises as `around_markers`."""
    before, after = around_markers(path)
    Path(path).write_text(f"{before}{BEGIN}\n\n{markdown(run)}\n\n{END}{after}")


def around_markers(path: str | Path) -> tuple[str, str]:
    """What a file holds before and after its two markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    before, *rest = Path(path).read_text().split(BEGIN)
    _, *after = "".join(rest).split(END)
    if (len(rest), len(after)) != (1, 1) or END in before:
        raise ValueError(f"{path}: expected one {BEGIN!r} and after it one {END!r}.")
    return before, after[0]


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install flamingo-kernels[bench]") from error
    return Figure(**options)


def picture(run: Run, path: str | Path) -> None:
    """Draw how many times as long as ours the rivals take. Raises as `new_figure`."""
    cases = list(run.cases.items())[::-1]  # barh draws upwards
    figure = new_figure(figsize=(9, 1.4 + 0.45 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for name in RIVALS:
        bars = [(y, rows[name].ratio, _slot(name, rows)) for y, (_, rows) in enumerate(cases) if name in rows]
        if bars:
            heights = [y + centre for y, _, (centre, _) in bars]
            widths = [ratio - 1 for _, ratio, _ in bars]
            drawn = axes.barh(
                heights, widths, [each for *_, (_, each) in bars], left=1, color=_COLOURS[name], label=name
            )
            labels = [_times(ratio) for _, ratio, _ in bars]
            axes.bar_label(drawn, labels, padding=3, fontsize=7, color="#444444")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(cases)), [_label(key) for key, _ in cases], fontsize=8)
    axes.margins(x=0.08, y=0.3 / len(cases))
    axes.set_xlabel("times as long as flamingo_kernels; right of 1 ours is faster", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=len(RIVALS))
    figure.supxlabel(conditions(run), fontsize=7, color="#666666")
    figure.savefig(path, dpi=160)


def _slot(name: str, rows: dict[str, Row]) -> tuple[float, float]:
    """Centre, off the middle, and thickness of a rival's bar among those of its case."""
    present = [rival for rival in RIVALS if rival in rows]
    thickness = min(0.8 / len(present), 0.35)
    return (len(present) / 2 - present.index(name) - 0.5) * thickness, thickness


_USUAL = "".join(f" {letter}{size}" for letter, size in HEADS.items())
_COLOURS = {"eager": "#c8553d", "sdpa": "#588b8b", "compile": "#f28f3b", "torch.add": "#93b7be"}


def _label(key: Key) -> str:
    return f"{key.op}  {_short(key.shape)}\n{key.dtype}, {key.mode}"


def _short(shape: str) -> str:
    """The shape without the sizes that all attention has."""
    return shape.removesuffix(_USUAL)


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
