"""Which product computes a linear layer: one table, by processor, dtype, direction and number of rows.

`measured.json` holds what `python -m flamingo_kernels tune linear` found on the processors named there; what
it finds on another is kept for the user (`FLAMINGO_KERNELS_CACHE`). A processor that nobody measured gets
torch's own products.
"""

from __future__ import annotations

import json
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..._backends import cpu, env

SHIPPED = Path(__file__).with_name("measured.json")
OWN = env.CACHE / "linear.json"

# A smaller weight is multiplied before another product than torch's could be chosen.
LEAST_WEIGHTS = 2**18

WAYS = ("forward", "dx", "dw")
NAMES = ("torch", "cpu", "mkl", "onednn")

# By dtype and way, in the order of rows: up to so many (None: any), this product. Beyond the last: torch's.
Table = dict[str, dict[str, list[tuple[int | None, str]]]]


@cache
def choose(way: str, dtype: torch.dtype, rows: int) -> str:
    """The fastest product: a name in `products.PRODUCTS`."""
    limits = table().get(str(dtype).removeprefix("torch."), {}).get(way, [])
    return next((name for most, name in limits if most is None or rows <= most), "torch")


@cache
def table() -> Table:
    """What was measured on this processor: by its user, or else by us."""
    for path in (OWN, SHIPPED):
        measured = _read(path).get(processor(), {})
        if measured:
            return measured["products"]
    return {}


def forget() -> None:
    """Read the tables anew at the next call."""
    table.cache_clear()
    choose.cache_clear()


def keep(measured: dict[str, Any]) -> None:
    """Keep what was measured on this processor for later processes."""
    OWN.parent.mkdir(parents=True, exist_ok=True)
    whole = OWN.with_name(f"{OWN.name}.{os.getpid()}")  # another process may be reading the file
    whole.write_text(json.dumps({**_read(OWN), processor(): measured}, indent=1) + "\n")
    whole.replace(OWN)
    forget()


@cache
def processor() -> str:
    """Maker and instruction set of this processor, as "AuthenticAMD avx512_bf16"."""
    return f"{_vendor()} {cpu.cpu_variant() or 'no kernels'}"


def _vendor() -> str:
    try:
        found = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found, dict) or not _is_measured(found.get(processor())):
            raise ValueError("something else than tables of products")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"linear: expected JSON in {path}, got {error}; delete it and tune again.") from None
    return found


def _is_measured(entry: Any) -> bool:
    """Whether an entry of a file is what `tune` writes about a processor, or there is none."""
    if entry is None:
        return True
    try:
        ways = [limits for ways in entry["products"].values() for limits in ways.values()]
        return all(name in NAMES and (most is None or most > 0) for limits in ways for most, name in limits)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
