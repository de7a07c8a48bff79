"""Finds the fastest product of linear layers on this machine: `python -m flamingo_kernels tune linear`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flamingo.command_line import count_from, expect_writable, time_span

from .._backends import cpu, dispatch
from ..ops.linear import config
from ..ops.linear.products import PRODUCTS
from . import info
from .measure.memory import copies_beyond_caches
from .measure.text import dtype_name, rounded
from .measure.timing import Call, Spread, interleave

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # out, in
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)
FEW = 64  # rows beyond which the kernel for few is not tried
GAIN = 1.1  # what another product than torch's must gain over the shapes
LOSS = 0.97  # and may lose in one of them


class Found(NamedTuple):
    """What was measured of one dtype, direction and number of rows.

    Attributes:
        times: of each product, for each shape.
        best: the product to take.
    """

    dtype: torch.dtype
    way: str
    rows: int
    times: list[dict[str, Spread]]
    best: str

    def gain(self, name: str) -> float:
        """How many times as fast as torch's a product is, the geometric mean over the shapes."""
        return geometric_mean(_ratios(self.times, name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", choices=["linear"], help="what to tune")
    parser.add_argument(
        "--rows", type=count_from(1), nargs="+", default=ROWS, help="how many rows of x (default: 1 to 1024)"
    )
    parser.add_argument("--seconds", type=time_span, default=0.3, help="for each measurement (default: 0.3)")
    parser.add_argument("--out", metavar="FILE", help="write here, and not where the library looks for it")


def main(options: argparse.Namespace) -> int:
    """The command `tune`: measure on a quiet machine, show, and keep for later processes.

    Raises:
        ValueError: there is no kernel to compare, or what was kept before is damaged.
        OSError: what was found cannot be kept.
    """
    if why := cpu.why_not():
        raise ValueError(why)
    if not options.out:
        config.OWN.parent.mkdir(parents=True, exist_ok=True)
        config.forget()
        config.table()  # what is kept there already, which can be read or not
    expect_writable(options.out or config.OWN)
    threads = torch.get_num_threads()
    print(f"{config.processor()}: {info.processor_name()}, {threads} threads, torch {torch.__version__}")
    print(f"{'dtype':<9} {'way':<8} {'rows':>5}  {'best':<7}  gain of each over torch's")
    found = []
    for each in measure(sorted(set(options.rows)), options.seconds):
        found.append(each)
        gains = ", ".join(f"{name} {rounded(each.gain(name))}x" for name in each.times[0] if name != "torch")
        print(
            f"{dtype_name(each.dtype):<9} {each.way:<8} {each.rows:>5}  {each.best:<7}  {gains}", flush=True
        )
    measured = {
        "processor": info.processor_name(),
        "threads": threads,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "by": "tune linear",
        "products": summary(found),
    }
    if options.out:
        Path(options.out).write_text(json.dumps({config.processor(): measured}, indent=1) + "\n")
    else:
        config.keep(measured)
    print(f"kept in {options.out or config.OWN}")
    return 0


def measure(rows: list[int], seconds: float) -> Iterator[Found]:
    """Time every product of each dtype and direction, on weights that no cache holds."""
    for dtype in dispatch.KERNEL_DTYPES:
        weights = [_weights(*shape, dtype) for shape in SHAPES]
        for way in config.WAYS:
            for count in rows:
                times = [
                    interleave(_calls(way, count, each, dtype), seconds=seconds, least_rounds=9)
                    for each in weights
                ]
                yield Found(dtype, way, count, times, _best(times))


def _weights(outputs: int, inputs: int, dtype: torch.dtype) -> list[Tensor]:
    return copies_beyond_caches(torch.randn(outputs, inputs).div_(inputs**0.5).to(dtype))


def _calls(way: str, rows: int, weights: list[Tensor], dtype: torch.dtype) -> dict[str, Call]:
    """Each product as a call, which takes the next copy of the weight every time."""
    outputs, inputs = weights[0].shape
    x, dy = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    copies = cycle(weights)
    names = [name for name in ("torch", "onednn") if not PRODUCTS[name].why_not(dtype)]
    names += ["cpu"] * (way == "forward" and rows <= FEW)
    calls: dict[str, Call] = {}
    for name in names:
        product = PRODUCTS[name]
        if way == "forward":
            calls[name] = partial(_forward, product.forward, x, copies)
        elif way == "dx":
            calls[name] = partial(_dx, product.dx, dy, copies)
        else:
            calls[name] = partial(product.dw, dy, x)
    return calls


def _forward(product: Any, x: Tensor, weights: Iterator[Tensor]) -> None:
    with torch.no_grad():
        product(x, next(weights), None)


def _dx(product: Any, dy: Tensor, weights: Iterator[Tensor]) -> None:
    with torch.no_grad():
        product(dy, next(weights))


def _ratios(times: list[dict[str, Spread]], name: str) -> list[float]:
    """How many times as fast as torch's a product is for each shape."""
    return [each["torch"].median / each[name].median for each in times]


def _best(times: list[dict[str, Spread]]) -> str:
    """The product that gains most over torch's, if it gains enough and loses nowhere."""
    gains = {}
    for name in times[0]:
        ratios = _ratios(times, name)
        if min(ratios) >= LOSS:
            gains[name] = geometric_mean(ratios)
    best = max(gains, key=lambda name: gains[name])
    return best if gains[best] >= GAIN else "torch"


def summary(found: list[Found]) -> config.Table:
    """The table of products by rows: each up to the most rows at which it was the best, the last to any.

    What is the best at one number of rows alone, with torch's before and after it, is so by chance.
    """
    table: config.Table = {}
    for dtype, way in dict.fromkeys((each.dtype, each.way) for each in found):
        best = [(each.rows, each.best) for each in found if (each.dtype, each.way) == (dtype, way)]
        names = [best[0][1], *(name for _, name in best), best[-1][1]]
        lonely = [before == after == "torch" for before, after in zip(names, names[2:], strict=False)]
        limits: list[tuple[int | None, str]] = []
        for (rows, name), by_chance in zip(best, lonely, strict=True):
            taken = "torch" if by_chance else name
            if limits and limits[-1][1] == taken:
                limits.pop()
            limits.append((rows, taken))
        _, last = limits.pop()
        table.setdefault(dtype_name(dtype), {})[way] = [*limits, *([] if last == "torch" else [(None, last)])]
    return table
