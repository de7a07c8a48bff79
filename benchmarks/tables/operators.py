"""Operators and layers beside their rivals, by processor, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.report import COLUMNS, markdown
from flamingo_kernels.commands.bench.rows import Key
from flamingo_kernels.commands.measure.text import duration, factor, row

from .records import operators

ATTENTION, BOTH = " H8 d64 R64", "forward+backward"
# What README.md shows: measured on every processor of ours, wins and draws.
HEADLINES = (
    Key("masked_cross_attention", f"B1 T1024 M8{ATTENTION}", "float32", "forward"),
    Key("masked_cross_attention", f"B1 T2048 M32{ATTENTION}", "bfloat16", BOTH),
    Key("perceiver_attention", f"N1 S7680{ATTENTION}", "bfloat16", "forward"),
    Key("gated_residual", "rows4096 D2048", "float32", BOTH),
)


def whole(device: Path) -> str:
    """Every row of a device."""
    return markdown(operators(device))


def headlines(devices: Mapping[str, Path]) -> str:
    """The rows of README.md: our time, and how many times as long its rivals take, on each processor.

    Args:
        devices: the folders of the records, by the names of the processors.
    """
    rivals = ", ".join(COLUMNS.values())
    lines = [
        f"| operator | dtype, mode | {' | '.join(f'{name}: ours; {rivals}' for name in devices)} |",
        f"|---|---|{'--:|' * len(devices)}",
    ]
    for key in HEADLINES:
        found = [operators(folder).cases[key] for folder in devices.values()]
        cells = (
            f"{duration(rows[OURS].median_ms)}; "
            + ", ".join(factor(rows[name].ratio) if name in rows else "-" for name in COLUMNS)
            for rows in found
        )
        shape = key.shape.removesuffix(ATTENTION)
        lines.append(row(f"`{key.op}` {shape}", f"{key.dtype}, {key.mode}", *cells))
    return "\n".join(lines)
