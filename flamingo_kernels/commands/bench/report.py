"""Shows a run: a table for the terminal, one in Markdown, and a picture."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flamingo.machine import counted

from ..._html import bar, page, paragraph
from ..._html import table as html_table
from ..measure.figure import new_figure
from ..measure.text import duration, factor
from ..measure.text import row as row_of
from .baselines import BACKENDS, FLOORS, OURS
from .shapes import CASES_OF, FLAT_MEMORY, HEADS, Floor, Target

if TYPE_CHECKING:
    from .rows import Key, Row, Run, Skipped

COLUMNS = {"eager": "eager", "sdpa": "SDPA", "compile": "compile"}
_OF_INTEGERS = ("int8", "bfloat16", "dynamic", "int8pack", "torchao")
MORE_COLUMNS = {
    name: name for name in ("flex", "flash-attn", *BACKENDS, "folded", "onednn", "few rows", *_OF_INTEGERS)
}  # where there are any
RIVALS = (*COLUMNS, *MORE_COLUMNS, *FLOORS)


class Verdict(NamedTuple):
    """A target, the ratio or the share that was measured, and whether it is enough."""

    target: Target | Floor
    measured: float

    @property
    def met(self) -> bool:
        wanted = self.target.share if isinstance(self.target, Floor) else self.target.ratio
        return self.measured >= wanted

    def __str__(self) -> str:
        return f"{self.target}: {_met(self.met)} ({self.shown})"

    @property
    def shown(self) -> str:
        if isinstance(self.target, Floor):
            return f"{self.measured:.0%}"
        # A rival that may be a little faster is a ratio below 1, and reads better the other way round.
        return factor(self.measured if self.target.ratio > 1 else 1 / self.measured)


def verdicts(key: Key, rows: dict[str, Row]) -> list[Verdict]:
    """The targets of a case that could be measured."""
    judged = ((target, _measured(target, rows)) for target in _targets(key, rows[OURS].device_type))
    return [Verdict(target, value) for target, value in judged if value is not None]


def _targets(key: Key, device_type: str) -> tuple[Target | Floor, ...]:
    cases = CASES_OF[device_type]
    return next((case.targets for case in cases if key == (case.op, case.shape, case.dtype, case.mode)), ())


def _measured(target: Target | Floor, rows: dict[str, Row]) -> float | None:
    if isinstance(target, Floor):
        return rows[OURS].floor_share
    ratios = [rows[name].ratio for name in target.against if name in rows]
    return min(ratios) if len(ratios) == len(target.against) else None


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
    width = max([17, *(len(each.contender) for each in (*run.rows, *run.skipped))])
    for key, rows in run.cases.items():
        lines += ["  ".join(key)]
        lines += [_line(row, width) for row in sorted(rows.values(), key=_order)]
        lines += [f"    {verdict}" for verdict in verdicts(key, rows)]
        lines += [f"    {each.contender:<{width}} {_reason(each)}" for each in run.skipped if each.key == key]
        lines += [""]
    lines += [f"{' '.join(each.key)}: {each.contender} {_reason(each)}" for each in _without_case(run)]
    return "\n".join([*lines, *filter(None, [memory_verdict(run), conditions(run)])])


def html(run: Run) -> str:
    """For a notebook: a table with a bar for each time, and what is missing."""
    rows = [
        (
            "  ".join(key) if row.contender == OURS else "",
            row.contender,
            duration(row.median_ms),
            factor(row.ratio),
            "floor" if row.err is None else f"{row.err:.1e} of {row.budget:.1e}",
            bar(row.median_ms / max(each.median_ms for each in timed.values())),
        )
        for key, timed in run.cases.items()
        for row in sorted(timed.values(), key=_order)
    ]
    missing = [("  ".join(each.key), each.contender, _reason(each)) for each in run.skipped]
    return page(
        html_table(("", "contender", "median", "ratio", "error", ""), rows) if rows else "",
        html_table(("without a row", "contender", "why"), missing) if missing else "",
        paragraph(conditions(run)),
    )


def brief(run: Run) -> str:
    """One line a case and one for its targets, where there is little room."""
    columns = [*columns_of(run), *FLOORS]
    line = "{:<64} {:>9} {:>6}" + "".join(f" {{:>{max(len(name), 7)}}}" for name in columns)
    lines = [line.format("times as long as ours", "ours", "floor", *columns)]
    for key, rows in run.cases.items():
        mode = key.mode.replace("forward+backward", "both")
        share, ours = rows[OURS].floor_share, duration(rows[OURS].median_ms)
        cells = [
            f"{key.op} {_short(key.shape)} {key.dtype} {mode}",
            ours,
            "-" if share is None else f"{share:.0%}",
        ]
        cells += [factor(rows[name].ratio) if name in rows else "-" for name in columns]
        lines.append(line.format(*cells))
        lines += [f"    {'; '.join(map(str, found))}" for found in [verdicts(key, rows)] if found]
    return "\n".join(lines + _left_out(run))


def _left_out(run: Run) -> list[str]:
    """The contenders without a row, by reason."""
    counts = Counter(f"{each.contender} {_reason(each)}"[:160] for each in run.skipped)
    return [f"{what} ({count}x)" for what, count in counts.items()]


def markdown(run: Run) -> str:
    """One line a case, in Markdown."""
    columns = columns_of(run) | _timed(run, {name: name for name in FLOORS})
    lines = [
        f"| | dtype | mode | ours | {' | '.join(columns.values())} | target |",
        f"|---|---|---|--:|{'--:|' * len(columns)}---|",
    ]
    for key, rows in run.cases.items():
        cells = [f"`{key.op}` {_short(key.shape)}", key.dtype, key.mode, duration(rows[OURS].median_ms)]
        cells += [factor(rows[name].ratio) if name in rows else "-" for name in columns]
        cells.append("<br>".join(map(str, verdicts(key, rows))))
        lines.append(row_of(*cells))
    notes = [
        f"Columns of rivals: how many times as long as ours they take. Attention has{_USUAL}. "
        f"{' and '.join(FLOORS)} are floors, not rivals: they do only a part of the work. "
        "A dash: no such rival, or it was left out (no compiler, or a wrong result).",
        memory_verdict(run),
        conditions(run),
    ]
    return "\n".join([*lines, "", "\n\n".join(filter(None, notes))])


def columns_of(run: Run) -> dict[str, str]:
    """The rivals that have a column in a table of this run, and its heading."""
    return COLUMNS | _timed(run, MORE_COLUMNS) | {name: f"`{name}`" for name in own_rivals(run)}


def own_rivals(run: Run) -> list[str]:
    """The rivals of the user's that have a row."""
    return list(dict.fromkeys(row.contender for row in run.rows if row.contender not in (OURS, *RIVALS)))


def _timed(run: Run, columns: dict[str, str]) -> dict[str, str]:
    """Those of the columns that have a row."""
    timed = {row.contender for row in run.rows}
    return {name: heading for name, heading in columns.items() if name in timed}


def conditions(run: Run) -> str:
    """What the numbers were measured on."""
    if not run.rows:
        return ""
    ours = {row.variant for row in run.rows if row.contender == OURS}
    row = max(run.rows, key=lambda row: row.time)
    commits = ", ".join(dict.fromkeys(each.commit for each in run.rows if each.commit))
    commit = f", commit {commits}" if commits else ""
    threads = f", {counted(row.threads, 'thread')}" if row.device_type == "cpu" else ""
    return (
        f"Medians on {row.device}{threads}, torch {row.torch}, backend "
        f"{', '.join(sorted(ours))}{commit}, {row.time}."
    )


def picture(run: Run, path: str | Path) -> None:
    """Draw how many times as long as ours the rivals take. Raises as `new_figure`."""
    names = [*RIVALS, *own_rivals(run)]
    places, ticks, height = _places(run, names)
    figure = new_figure(figsize=(9, 1.8 + 0.15 * height), layout="constrained")
    axes = figure.add_subplot()
    colours = _COLOURS | dict(zip(own_rivals(run), cycle(_OWN_COLOURS), strict=False))
    for name in names:
        ratios = {y: rows[name].ratio for y, (rows, contender) in places.items() if contender == name}
        if ratios:
            widths = [ratio - 1 for ratio in ratios.values()]
            drawn = axes.barh(list(ratios), widths, 0.9, left=1, color=colours[name], label=name)
            labels = [factor(ratio) for ratio in ratios.values()]
            axes.bar_label(drawn, labels, padding=3, fontsize=7, color="#444444")
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylim(height, -1)  # downwards
    axes.margins(x=0.08)
    axes.set_xlabel("times as long as flamingo_kernels; right of 1 ours is faster", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=6)
    figure.supxlabel(textwrap.fill(conditions(run), 105), fontsize=8, color="#555555")
    figure.savefig(path, dpi=160)


def _places(
    run: Run, names: Sequence[str]
) -> tuple[dict[float, tuple[dict[str, Row], str]], dict[float, str], float]:
    """Where the bar of each rival of a case is, where the case has its label, and the height of all."""
    places: dict[float, tuple[dict[str, Row], str]] = {}
    ticks: dict[float, str] = {}
    top = 0.0
    for key, rows in run.cases.items():
        present = [name for name in names if name in rows]
        places |= {top + number: (rows, name) for number, name in enumerate(present)}
        most = max(len(present), 2)  # a label has two lines
        ticks[top + (max(len(present), 1) - 1) / 2] = _label(key)
        top += most + 1
    return places, ticks, top


_USUAL = "".join(f" {letter}{size}" for letter, size in HEADS.items())
_COLOURS = {
    "eager": "#c8553d",
    "sdpa": "#588b8b",
    "compile": "#f28f3b",
    "flex": "#6a4c93",
    "flash-attn": "#8ab17d",
    "cuda": "#76b041",
    "triton": "#c9a227",
    "folded": "#3d5a80",
    "onednn": "#5c946e",
    "few rows": "#a44a3f",
    "int8": "#2a9d8f",
    "bfloat16": "#e9c46a",
    "dynamic": "#8d99ae",
    "int8pack": "#bc6c25",
    "torchao": "#606c38",
    "torch.add": "#93b7be",
    "products": "#b0a8b9",
    "read": "#adb5bd",
}
_OWN_COLOURS = ("#1d3557", "#e63946", "#ffb703")  # of the user's rivals


def _label(key: Key) -> str:
    return f"{key.op}  {_short(key.shape)}\n{key.dtype}, {key.mode}"


def _short(shape: str) -> str:
    """The shape without the sizes that all attention has."""
    return shape.removesuffix(_USUAL)


def _order(row: Row) -> tuple[bool, float]:
    """Ours first, then from the fastest on."""
    return row.contender != OURS, row.median_ms


def _line(row: Row, width: int) -> str:
    time = f"{duration(row.median_ms):>10} ({row.p20_ms:.4g} to {row.p80_ms:.4g})"
    error = "a floor, not compared" if row.err is None else f"error {row.err:.1e} of {row.budget:.1e}"
    memory = "" if row.extra_mib is None else f"{row.extra_mib:.1f} MiB"
    cells = [f"{row.contender:<{width}}", f"{time:<32}", f"{factor(row.ratio):>7}", f"{memory:>10}", error]
    floor = "" if row.floor_share is None else f"{row.floor_share:.0%} of the byte floor"
    return "    " + "  ".join([*cells, row.variant, floor]).rstrip()


def _reason(skipped: Skipped) -> str:
    return f"{'REFUSED' if skipped.refused else 'skipped'}: {skipped.reason}"


def _without_case(run: Run) -> list[Skipped]:
    return [each for each in run.skipped if each.key not in run.cases]


def _met(met: bool) -> str:
    return "met" if met else "not met"
