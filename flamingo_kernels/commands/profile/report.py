"""Shows a profile: a page of text, what JSON keeps, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._html import bar as html_bar
from ..._html import page, paragraph, table
from ..measure.figure import new_figure
from ..measure.text import duration, factor, mebibytes, rounded, setting, verdict
from ..measure.timing import Spread
from .parts import BLOCKS, INSIDE, PARTS
from .sides import BEFORE, COMPILED, FOLDED, FROZEN, INT8, LINEARS, PATCHED

if TYPE_CHECKING:
    from .apart import Apart
    from .count import Counted
    from .run import Measured, Profile

TITLES = {
    BEFORE: "as it is",
    PATCHED: "patch",
    LINEARS: "patch with linears",
    FOLDED: "linears, folded",
    INT8: "patch and int8",
    COMPILED: "torch.compile",
    FROZEN: "inductor, frozen",
}
OVERLAP = '"~": the spreads of both, 20% to 80%, overlap'
_WIDTH, _FACTOR = 27, 8  # of a cell, and of what it gains


def measured(found: Profile) -> str:
    """A profile as a page of text."""
    size = _size(found)
    lines = [
        f"{found.model}, {found.dtype}, {size}; {_shapes(found.inputs)}",
        *(["all under torch.compile; their parts without it"] if found.compiled else []),
        *(
            ["float64 of a block at a time, no training step: all of it does not fit"]
            if found.by_block
            else []
        ),
        setting(found.conditions),
        "",
        found.patched,
        "",
        _PROOF.format("relative error against float64", "found", "allowed", "").rstrip(),
    ]
    lines += [
        _PROOF.format(f"  {name}, {TITLES[side]}", *verdict(proof))
        for name, by_side in found.proofs.items()
        for side, proof in by_side.items()
    ]
    lines += [
        _PROOF.format(f"  {name}, {TITLES[side]}", f"{error:.1e}", "told", "").rstrip()
        for name, by_side in found.told.items()
        for side, error in by_side.items()
    ]
    if not found.same:
        return "\n".join([*lines, "", "The patched model computes something else: nothing was timed."])
    sides = list(next(iter(found.works.values())).times)
    lines += ["", _heading("tokens/s, median (20% to 80%)", sides)]
    for name, work in found.works.items():
        lines.append(
            _line(f"  {name}", {side: _spread(work.speed(side)) for side in work.times}, _gains(work))
        )
        lines += [f"    {work.note}"] if work.note else []
    lines += ["", _heading("memory", sides), *_memory(found.works)]
    for name, work in found.works.items():
        lines += ["", _heading(f"time by part, {name}", sides), *_by_part(work)]
    lines += [
        "",
        f"Gains of speed: {OVERLAP}.",
        "Parts: medians under torch.profiler, with its cost. A gate that rides on a product counts there.",
    ]
    return "\n".join(lines)


def _memory(works: Mapping[str, Measured]) -> list[str]:
    lines = []
    for name, work in works.items():
        if all(work.peak.values()):
            lines.append(_compared(f"  peak, {name}", work.peak, mebibytes))
        else:
            lines.append(f"  peak, {name}: cannot be measured here, or is too small to be seen")
        if work.saved:
            lines.append(_compared("  saved for the backward pass", work.saved, mebibytes))
    return lines


def _by_part(work: Measured) -> list[str]:
    parts = [part for part in PARTS if any(part in taken for taken in work.parts.values())]
    inside = [part for part in parts if part in INSIDE]
    rows = [(BLOCKS, inside)] if inside else []
    rows += [(f"  {_short(part)}", [part]) for part in inside]
    rows += [(part, [part]) for part in parts if part not in inside]
    rows.append(("all", parts))
    return [
        _compared(f"  {name}", {side: _sum(taken, which) for side, taken in work.parts.items()}, duration)
        for name, which in rows
    ]


def apart(found: Apart) -> str:
    """Times of processes of their own, as a page of text."""
    sizes, row = found.sizes, "{:<24}{:>12}{:>24}{:>9}{:>12}{:>12}{:>14}"
    generated = f", {sizes.new} to generate" if sizes.new else ""
    lines = [
        f"{found.model}, {found.dtype}, {_size(found)}; "
        f"{sizes.batch} x {sizes.text} tokens{generated}, {sizes.media} images",
        setting(found.conditions),
        "each in a process of its own"
        + (", beside the model as it is" if found.beside else "")
        + f"; {OVERLAP}",
    ]
    for work, times in found.times.items():
        heading = f"{work}, ms", "median", "20% to 80%", "gain", "tokens/s", "memory", "difference"
        lines += ["", row.format(*heading)]
        for side, spread in times.items():
            before = found.beside.get(work, {}).get(side) or times.get(BEFORE)
            peak = found.peak[work][side]
            difference = found.differences.get(work, {}).get(side)
            cells = (
                rounded(spread.median),
                f"{rounded(spread.p20)} to {rounded(spread.p80)}",
                before.gain(spread) if before and side != BEFORE else "",
                rounded(1e3 * found.tokens[work] / spread.median),
                "" if peak is None else mebibytes(peak),
                "" if difference is None else f"{difference:.1e}",
            )
            lines.append(row.format(f"  {TITLES[side]}", *cells).rstrip())
    for work, failed in found.failed.items():
        lines += [f"{work}, {TITLES[side]}, failed: {error}" for side, error in failed.items()]
    return "\n".join(lines)


def _size(found: Profile | Apart) -> str:
    random = "" if ":" in found.model else "random "  # the weights of a user's own may be trained
    return f"{rounded(found.parameters / 1e6)} M {random}parameters"


def counted(found: Counted) -> str:
    """What was counted, as a page of text."""
    line = "{:<34}{:>16}{:>16}{:>28}"
    lines = [
        f"{found.model}, {found.dtype}; {_shapes(found.inputs)}",
        f"Not run: it {found.lacking}. All below is counted, nothing is measured.",
        "",
        line.format("counted", "M parameters", "MiB", "GFLOP of a prefill"),
    ]
    for part in [*PARTS, "all"]:
        which = PARTS if part == "all" else [part]
        size, flops = _sum(found.parameters, which), _sum(found.prefill_flops, which)
        if size or flops:
            cells = f"{size / 1e6:.4g}", f"{size * found.bytes_each / 2**20:.4g}", f"{flops / 1e9:.4g}"
            lines.append(line.format(f"  {part}", *cells))
    lines += ["", "counted GFLOP of matrix products, as the model is written, with dense masks"]
    lines += [f"  {name:<32}{flops / 1e9:>16.4g}" for name, flops in found.flops.items()]
    lines += ["", _heading("counted memory of a training step", found.saved)]
    lines.append(_compared("  saved for the backward pass", found.saved, mebibytes))
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """What JSON can keep, fields and properties by name."""
    if is_dataclass(value):
        named = {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        named |= {name: plain(each) for name, each in getattr(value, "derived", {}).items()}
        return named
    if hasattr(value, "_asdict"):
        return value._asdict()
    return {key: plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def html_of_profile(found: Profile) -> str:
    """For a notebook: errors, speeds and memory as tables, times as bars."""
    proofs = [
        (f"{name}, {TITLES[side]}", *verdict(proof))
        for name, by_side in found.proofs.items()
        for side, proof in by_side.items()
    ]
    told = [
        (f"{name}, {TITLES[side]}", f"{error:.1e}", "told", "")
        for name, by_side in found.told.items()
        for side, error in by_side.items()
    ]
    return page(
        paragraph(f"{found.model}, {found.dtype}, {found.conditions['device']}; {_shapes(found.inputs)}"),
        paragraph(found.patched),
        table(("relative error against float64", "found", "allowed", ""), proofs + told),
        table(("", "time", "tokens/s", "gain", "peak", ""), _speeds(found)) if found.works else "",
        paragraph(
            f"Gains: {OVERLAP}. Bars: median times of a call, of that as it is."
            if found.works
            else "The patched model computes something else: nothing was timed."
        ),
    )


def _speeds(found: Profile) -> list[tuple[str, ...]]:
    return [
        (
            f"{name}, {TITLES[side]}",
            duration(spread.median),
            rounded(work.speed(side).median),
            "" if side == BEFORE else work.times[BEFORE].gain(spread),
            mebibytes(peak) if (peak := work.peak.get(side)) else "",
            html_bar(spread.median / max(each.median for each in work.times.values())),
        )
        for name, work in found.works.items()
        for side, spread in work.times.items()
    ]


def html_of_apart(found: Apart) -> str:
    """For a notebook: times of processes of their own."""
    rows = []
    for work, times in found.times.items():
        longest = max(spread.median for spread in times.values())
        for side, spread in times.items():
            before = found.beside.get(work, {}).get(side) or times.get(BEFORE)
            peak = found.peak[work][side]
            rows.append(
                (
                    f"{work}, {TITLES[side]}",
                    duration(spread.median),
                    before.gain(spread) if before and side != BEFORE else "",
                    "" if peak is None else mebibytes(peak),
                    html_bar(spread.median / longest),
                )
            )
    return page(
        paragraph(
            f"{found.model}, {found.dtype}, {found.conditions['device']}: each in a process of its own"
        ),
        table(("", "time", "gain", "memory", ""), rows),
        paragraph(f"Gains: {OVERLAP}."),
    )


def html_of_counted(found: Counted) -> str:
    """For a notebook: what was counted."""
    parts = [
        (part, f"{size / 1e6:.4g}", f"{found.prefill_flops.get(part, 0) / 1e9:.4g}")
        for part, size in found.parameters.items()
    ]
    works = [(name, f"{flops / 1e9:.4g}") for name, flops in found.flops.items()]
    return page(
        paragraph(f"{found.model}, {found.dtype}. Not run: it {found.lacking}. All is counted."),
        table(("part", "M parameters", "GFLOP of a prefill"), parts),
        table(("work", "GFLOP"), works),
    )


def picture(found: Profile, path: str | Path) -> None:
    """Draw the time of a call on every side, divided as its parts are. Raises as `new_figure`."""
    rows = [(name, side) for name, work in found.works.items() for side in work.times][::-1]  # drawn upwards
    figure = new_figure(figsize=(11, 1.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    ends = dict.fromkeys(rows, 0.0)
    bars = [bar(found.works[name], side) for name, side in rows]
    for part in PARTS:
        widths = [each.get(part, 0.0) for each in bars]
        if any(widths):
            axes.barh(
                range(len(rows)), widths, 0.72, left=list(ends.values()), color=_COLOURS[part], label=part
            )
        ends = {row: end + width for (row, end), width in zip(ends.items(), widths, strict=True)}
    for y, (name, side) in enumerate(rows):
        label = f"  {ends[name, side]:.2f}: {_labelled(found.works[name], side)}"
        axes.text(ends[name, side], y, label, va="center", fontsize=9, color="#333333")
    axes.set_yticks(range(len(rows)), [f"{name}, {TITLES[side]}" for name, side in rows], fontsize=9)
    axes.set_xlim(0, 1.4 * max([1.0, *ends.values()]))
    axes.set_xlabel(
        f"median time of a call, of that as it is; colours: shares under torch.profiler; {OVERLAP}",
        fontsize=9,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    size = _size(found)
    compiled = ", under torch.compile" if found.compiled else ""
    title = f"{found.model}, {found.dtype}, {size}{compiled}\n{setting(found.conditions)}"
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=130)


def bar(work: Measured, side: str) -> dict[str, float]:
    """The time of a call on a side, over that as it is, divided by part as under torch.profiler."""
    parts = work.parts[side]
    length = work.times[side].median / work.times[BEFORE].median
    return {part: length * taken / sum(parts.values()) for part, taken in parts.items()}


def _labelled(work: Measured, side: str) -> str:
    """The numbers beside a bar."""
    gain = "" if side == BEFORE else f", {_gains(work)[side]}"
    return f"{duration(work.times[side].median)}, {rounded(work.speed(side).median)} tokens/s{gain}"


# A gated block in shades of red, the rest of the model in cold colours.
_SHADES = ("#f4b8a8", "#e88a73", "#c8553d", "#f28f3b", "#8f2d1b", "#588b8b", "#93b7be", "#6a4c93", "#cccccc")
_COLOURS = dict(zip(PARTS, _SHADES, strict=True))


_PROOF = "{:<48}{:>12}{:>12}{:>10}"


def _heading(name: str, sides: Iterable[str]) -> str:
    return _line(name, {side: TITLES[side] for side in sides}, {})


def _line(name: str, cells: Mapping[str, str], gains: Mapping[str, str]) -> str:
    """A row: a cell for each side, and behind each but the first what it gains."""
    text = f"{name:<34}"
    for side, cell in cells.items():
        text += f"{cell:>{_WIDTH}}"
        if side != BEFORE:
            text += f"{gains.get(side, ''):>{_FACTOR}}"
    return text.rstrip()


def _gains(work: Measured) -> dict[str, str]:
    return {side: work.times[BEFORE].gain(spread) for side, spread in work.times.items() if side != BEFORE}


def _compared(name: str, values: Mapping[str, Any], shown: Callable[[float], str]) -> str:
    gains = {side: factor(values[BEFORE] / value) for side, value in values.items() if value}
    return _line(name, {side: shown(value) for side, value in values.items()}, gains)


def _sum(values: Mapping[str, float], which: Iterable[str]) -> float:
    return sum(values.get(part, 0) for part in which)


def _short(part: str) -> str:
    return part.removeprefix(f"{BLOCKS}: ")


def _shapes(inputs: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in inputs.items())


def _spread(value: Spread) -> str:
    return f"{rounded(value.median)} ({rounded(value.p20)} to {rounded(value.p80)})"
