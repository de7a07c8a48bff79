"""Times each side of a model in a process of its own, as its user would start it, one call of each in turn.

torch.compile, alone and with inductor's frozen weights, stands beside. Results are not compared: `run` does.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from ...patch import patch
from ..info import conditions_on
from ..measure.progress import ProgressBar
from ..measure.text import dtype_name, first_line
from ..measure.timing import Call, Spread, host_clock, interleave
from .run import BEFORE, LINEARS, PATCHED, call
from .subject import STEP, Plan, Sizes

COMPILED, FROZEN = "compile", "freezing"
PAUSE = 0.05  # seconds between two processes, after which threads of the first no longer spin
WARM = 3  # calls before the first that counts


@dataclass(frozen=True)
class Apart:
    """What one run found.

    Attributes:
        times: milliseconds of one call, by work and side.
        failed: what a side said that could not do a work.
    """

    model: str
    dtype: str
    sizes: Sizes
    conditions: dict[str, Any]
    times: dict[str, dict[str, Spread]]
    failed: dict[str, dict[str, str]]


def run(plan: Plan, *, dtype: torch.dtype, seconds: float) -> Apart:
    """Time a model on a cpu.

    Args:
        plan: the model.
        dtype: of its weights and inputs.
        seconds: how long to time one kind of work, all sides together.
    """
    works = list(plan.subject(dtype, "cpu").works)
    found = Apart(plan.name, dtype_name(dtype), plan.sizes, conditions_on("cpu"), {}, {})
    progress = ProgressBar(len(works))
    for work in works:
        with _processes(plan, dtype, work, progress) as (calls, found.failed[work]):
            progress(f"{work}: timing")
            found.times[work] = interleave(calls, seconds=seconds, clock=lambda sample, _: sample())
    progress.close()
    return found


def _patched(model: nn.Module) -> None:
    patch(model)


def _with_linears(model: nn.Module) -> None:
    patch(model, linears=True)


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
}


@contextmanager
def _processes(
    plan: Plan, dtype: torch.dtype, work: str, progress: Callable[[str], None]
) -> Iterator[tuple[dict[str, Call], dict[str, str]]]:
    """A process for each side, as calls that take one sample there, and what those said that failed."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    try:
        for side in SIDES:
            if (side, work) == (FROZEN, STEP):  # what is trained is not frozen
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
            if error := _answer(ours):
                failed[side] = error
            else:
                calls[side] = partial(_sample, ours)
        yield calls, failed
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.join(5)
            process.kill()


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
            timed()
    except Exception as error:
        end.send(first_line(error))
        return
    end.send("")
    last = None
    while _answer(end) is True:
        last = host_clock(timed, last)
        end.send(last)
