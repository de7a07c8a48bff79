"""Times each side of a model in a process of its own, as its user would start it, one call of each in turn.

torch.compile, alone and with inductor's frozen weights, may stand beside. How far the last numbers of a
result are from those of the model as it is, is told; `run` holds whole results against float64.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from ...patch import patch
from ...quantize import quantize
from ..info import conditions_on
from ..measure.progress import ProgressBar
from ..measure.text import dtype_name, first_line
from ..measure.timing import Call, Spread, host_clock, interleave
from .run import BEFORE, INT8, LINEARS, PATCHED, call
from .subject import STEP, Plan, Sizes

COMPILED, FROZEN = "compile", "freezing"
PAUSE = 0.05  # seconds between two processes, after which threads of the first no longer spin
WARM = 3  # calls before the first that counts
COMPARED = 4096  # numbers


@dataclass(frozen=True)
class Apart:
    """What one run found.

    Attributes:
        times: milliseconds of one call, by work and side.
        differences: of the last numbers of the result, relative to their norm as it is.
        failed: what a side said that could not do a work.
    """

    model: str
    dtype: str
    sizes: Sizes
    conditions: dict[str, Any]
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)


def run(
    plan: Plan, *, dtype: torch.dtype, seconds: float, compiled: bool = False, quantized: bool = False
) -> Apart:
    """Time a model on a cpu.

    Args:
        plan: the model.
        dtype: of its weights and inputs.
        seconds: how long to time one kind of work, all sides together.
        compiled: whether sides under torch.compile stand beside.
        quantized: whether a side with weights of 8-bit integers does.
    """
    asked = {COMPILED: compiled, FROZEN: compiled, INT8: quantized}
    sides = [side for side in SIDES if asked.get(side, True)]
    works = list(plan.subject(dtype, "cpu").works)
    found = Apart(plan.name, dtype_name(dtype), plan.sizes, conditions_on("cpu"))
    progress = ProgressBar(len(works))
    for work in works:
        with _processes(plan, dtype, work, sides, progress) as (calls, results, found.failed[work]):
            found.differences[work] = _differences(results)
            progress(f"{work}: timing")
            found.times[work] = interleave(calls, seconds=seconds, clock=lambda sample, _: sample())
    progress.close()
    return found


def _patched(model: nn.Module) -> None:
    patch(model)


def _with_linears(model: nn.Module) -> None:
    patch(model, linears=True)


def _with_integers(model: nn.Module) -> None:
    patch(model)
    quantize(model, vision=True, keep=False)


def _frozen(model: nn.Module) -> None:
    from torch._inductor import config

    config.freezing = True
    model.compile()


# What is done to a model that was just built.
SIDES: dict[str, Callable[[nn.Module], None]] = {
    BEFORE: lambda model: None,
    COMPILED: nn.Module.compile,
    FROZEN: _frozen,
    PATCHED: _patched,
    LINEARS: _with_linears,
    INT8: _with_integers,
}


@contextmanager
def _processes(
    plan: Plan, dtype: torch.dtype, work: str, sides: list[str], progress: Callable[[str], None]
) -> Iterator[tuple[dict[str, Call], dict[str, Tensor], dict[str, str]]]:
    """A process for each side: calls that take one sample there, the ends of results, and what failed."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    calls: dict[str, Call] = {}
    results: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    try:
        for side in sides:
            if work == STEP and side in (FROZEN, INT8):  # what is trained is neither
                continue
            progress(f"{work}: starting {side}")
            ours, theirs = context.Pipe()
            threads = torch.get_num_threads()
            process = context.Process(
                target=_serve, args=(plan, dtype, work, side, threads, theirs), daemon=True
            )
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
            answer = _answer(ours)
            if isinstance(answer, str):
                failed[side] = answer
            else:
                calls[side], results[side] = partial(_sample, ours), torch.tensor(answer)
        yield calls, results, failed
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.join(5)
            process.kill()


def _differences(results: dict[str, Tensor]) -> dict[str, float]:
    if BEFORE not in results:
        return {}
    before = results[BEFORE]
    return {
        side: float((each - before).norm() / before.norm())
        for side, each in results.items()
        if side != BEFORE
    }


def _answer(end: Connection) -> Any:
    try:
        return end.recv()
    except EOFError:
        return "its process ended"


def _sample(end: Connection) -> Any:
    time.sleep(PAUSE)
    end.send(True)
    return end.recv()


def _serve(plan: Plan, dtype: torch.dtype, work: str, side: str, threads: int, end: Connection) -> None:
    """In its process: build and warm one side, then time a call for each request."""
    torch.set_num_threads(threads)
    try:
        subject = plan.subject(dtype, "cpu")
        SIDES[side](subject.model)
        timed = call(work, subject.works[work], subject.model)
        for _ in range(WARM):
            *_, result = timed()  # logits, or of a training step the last gradient
    except Exception as error:
        end.send(first_line(error))
        return
    end.send(result.flatten()[-COMPARED:].double().tolist())
    last = None
    while _answer(end) is True:
        last = host_clock(timed, last)
        end.send(last)
