"""The picture of README.md: gains of whole models, then of operators by processor, as SVG.

It is text, so a change of a number shows in a diff; and it follows the reader's light or dark background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from flamingo_kernels.commands.measure.text import factor
from flamingo_kernels.commands.profile.report import TITLES
from flamingo_kernels.commands.profile.sides import INT8, LINEARS, PATCHED

from . import models, operators

WIDTH, LEFT, RIGHT = 860, 330, 60  # of the picture, of the labels, and behind the longest bar
BAR, GAP, GROUP = 11, 3, 12  # heights: of a bar, between two, and between groups
_COLOURS = {PATCHED: "#9db8d9", LINEARS: "#4a7fb5", INT8: "#c8553d"}
_BY_PROCESSOR = "#4a7fb5", "#d98e32"
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 10.5px; fill: #57606a }
  .title { font-size: 14px; font-weight: 600 }
  .card { fill: #ffffff }
  .line { stroke: #8c959f; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .card { fill: #0d1117 }
  }
"""


class Bar(NamedTuple):
    """A ratio, what is written behind it, and its colour."""

    ratio: float
    text: str
    colour: str


class Group(NamedTuple):
    """Bars under one label, which has a main and a small line."""

    label: str
    small: str
    bars: Sequence[Bar]


class Panel(NamedTuple):
    """Groups under a title, the meaning of their colours, and where they were measured."""

    title: str
    legend: Mapping[str, str]
    groups: Sequence[Group]
    note: str


def svg(processors: Mapping[str, Path]) -> str:
    """The whole picture.

    Args:
        processors: the folders of the records, by the names of the processors.
    """
    parts, top = [], 0.0
    for panel in (*(_models(*each) for each in processors.items()), _operators(processors)):
        drawn, height = _panel(panel, top)
        parts += drawn
        top += height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" role="img" '
        f'aria-label="How many times as fast models and operators are with flamingo-kernels">'
    )
    card = f'<rect class="card" width="{WIDTH}" height="{top:.0f}" rx="6"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", card, *parts, "</svg>", ""])


def _models(name: str, device: Path) -> Panel:
    groups, where, days = [], {}, set()
    for headline in models.HEADLINES:
        if not models.was_measured(device, headline.folder, headline.record):
            continue
        run = models.whole_model(device, headline.folder, headline.record)
        said = run["conditions"]
        where[f"{said['device']}, {said['threads']} threads, torch {said['torch']}"] = None
        days.add(said["time"][:10])
        pairs = {side: models.compared(run, headline.work, side) for side in models.SIDES}
        bars = [
            Bar(pair[0].median / pair[1].median, pair[0].gain(pair[1]), _COLOURS[side])
            for side, pair in pairs.items()
            if pair is not None
        ]
        groups.append(Group(headline.model, models.work_of(run, headline), bars))
    legend = {TITLES[side]: colour for side, colour in _COLOURS.items()}
    note = f"{'; '.join(where)}, random weights, {' to '.join(sorted({min(days), max(days)}))}"
    return Panel(f"Whole models on {name}: times as fast as without", legend, groups, note)


def _operators(processors: Mapping[str, Path]) -> Panel:
    legend = dict(zip(processors, _BY_PROCESSOR, strict=True))
    groups = []
    for key in operators.HEADLINES:
        cases = {name: operators.operators(folder).cases[key] for name, folder in processors.items()}
        rival = "sdpa" if all("sdpa" in rows for rows in cases.values()) else "compile"
        bars = [
            Bar(rows[rival].ratio, factor(rows[rival].ratio), legend[name]) for name, rows in cases.items()
        ]
        shape = key.shape.removesuffix(operators.ATTENTION)
        against = {"sdpa": "SDPA", "compile": "compile"}[rival]
        groups.append(Group(key.op, f"{shape}, {key.dtype}, {key.mode}; {against}", bars))
    rows = [max(operators.operators(folder).rows, key=lambda row: row.time) for folder in processors.values()]
    note = "; ".join(
        f"{row.device}, {row.threads} threads, torch {row.torch}, {row.time[:10]}" for row in rows
    )
    return Panel("Operators: times as fast as SDPA, or torch.compile", legend, groups, note)


def _panel(panel: Panel, top: float) -> tuple[list[str], float]:
    """A panel's elements, and its height."""
    longest = max(bar.ratio for group in panel.groups for bar in group.bars)
    logarithmic = longest > 8
    parts = [_text(10, top + 22, panel.title, "title")]
    x = LEFT
    for name, colour in panel.legend.items():
        parts += [_rect(x, top + 33, 10, 10, colour), _text(x + 15, top + 42, name, "small")]
        x += 34 + 5.6 * len(name)
    y = start = top + 58
    for group in panel.groups:
        height = max(len(group.bars) * (BAR + GAP), 28)
        parts += [_text(10, y + 11, group.label), _text(10, y + 24, group.small, "small")]
        for at, bar in enumerate(group.bars):
            row = y + at * (BAR + GAP)
            end = _x(bar.ratio, longest, logarithmic)
            begin, width = min(LEFT, end), abs(end - LEFT)
            parts.append(_rect(begin, row, max(width, 1), BAR, bar.colour))
            parts.append(_text(max(end, LEFT) + 5, row + BAR - 1.5, bar.text, "small"))
        y += height + GROUP
    parts.append(
        f'<line class="line" x1="{LEFT}" y1="{start - 4:.0f}" x2="{LEFT}" y2="{y - GROUP + 2:.0f}"/>'
    )
    scale = "; logarithmic" if logarithmic else ""
    parts.append(_text(LEFT, y + 4, f"bars begin at 1x: as fast{scale}", "small"))
    parts.append(_text(10, y + 20, panel.note, "small"))
    return parts, y + 34 - top


def _x(ratio: float, longest: float, logarithmic: bool) -> float:
    """Where a bar ends. It begins at 1."""
    share = math.log(ratio) / math.log(longest) if logarithmic else (ratio - 1) / (longest - 1)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.0f}" y="{y:.1f}"{kind}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.0f}" rx="2" fill="{colour}"/>'
