"""Numbers, dtypes, rows, proofs and errors as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from flamingo.machine import counted

if TYPE_CHECKING:
    from ...testing import Proof


def rounded(value: float) -> str:
    """A number to three digits, or to a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(milliseconds: float) -> str:
    """A time in milliseconds, or in seconds where it has some."""
    return f"{rounded(milliseconds)} ms" if milliseconds < 1000 else f"{rounded(milliseconds / 1000)} s"


def time_left(seconds: float) -> str:
    """A time that is still to come, in the unit that suits it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mebibytes(size: float) -> str:
    """A number of bytes, in MiB."""
    return f"{rounded(size / 2**20)} MiB"


def gibibytes(size: float) -> str:
    """A number of bytes, in GiB."""
    return f"{rounded(size / 2**30)} GiB"


def factor(ratio: float) -> str:
    """How many times as fast, as long or as large."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def row(*cells: str) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def setting(conditions: Mapping[str, Any]) -> str:
    """What `conditions_on` gave, in a line: "CPU: AMD EPYC, 2 threads, torch 2.13.0, 2026-11-30"."""
    on_cpu = conditions["device_type"] == "cpu"
    threads = f", {counted(conditions['threads'], 'thread')}" if on_cpu else ""
    return (
        f"{'CPU' if on_cpu else 'GPU'}: {conditions['device']}{threads}, torch {conditions['torch']}, "
        f"{conditions['time'][:10]}"
    )


def verdict(proof: Proof) -> tuple[str, str, str]:
    """An error relative to float64, what it may be, and whether the results are the same."""
    return f"{proof.err:.1e}", f"{proof.budget:.1e}", "same" if proof.passed else "DIFFERS"


def first_line(error: Exception) -> str:
    """An error by its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
