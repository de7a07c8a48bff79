"""Times each side of a model in a process of its own, as its user would start it, one call of each in turn.

torch.compile, alone and with inductor's frozen weights, may stand beside. How far the last numbers of a
result are from those of the model as it is, is told; `run` holds whole results against float64. Where all
sides do not fit into memory together, each is timed beside the model as it is and makes room for the next.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...fold import fold
from ...patch import patch
from ...quantize import quantize
from ..info import conditions_on
from ..measure.memory import available, peak_resident
from ..measure.progress import ProgressBar
from ..measure.text import dtype_name, first_line, gibibytes
from ..measure.timing import Call, Spread, host_clock, interleave
from . import report
from .run import call
from .sides import BEFORE, COMPILED, FOLDED, FROZEN, INT8, LINEARS, PATCHED
from .subject import GENERATION, STEP, Plan, Sizes

PAUSE = 0.05  # seconds between two processes, after which threads of the first no longer spin
WARM = 3  # calls before the first that counts
COMPARED = 4096  # numbers
LONG_ROUNDS = 3  # at least, of whole generations
OVERHEAD = 2**30  # bytes of a process beside its model: libraries, activations, caches


@dataclass(frozen=True, repr=False)
class Apart:
    """What one run found.

    Attributes:
        times: milliseconds of one call, by work and side.
        beside: those of the model as it is in the same rounds as a side, by work and side, where not all
            sides were there together.
        tokens: how many one call handles, by work.
        peak: bytes that a side's process holds at most during a call, its model among them, by work and side.
        differences: of the last numbers of the result, relative to their norm as it is.
        failed: what a side said that could not do a work.
    """

    model: str
    dtype: str
    sizes: Sizes
    parameters: int
    conditions: dict[str, Any]
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)
    beside: dict[str, dict[str, Spread]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak: dict[str, dict[str, int | None]] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return report.apart(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report.html_of_apart(self)


class Size(NamedTuple):
    """What decides how many processes fit: parameters, how many of them are trained, and the works."""

    parameters: int
    trained: int
    tokens: dict[str, int]

    @classmethod
    def of(cls, plan: Plan, dtype: torch.dtype) -> Size:
        with nullcontext() if plan.needs_memory else FakeTensorMode():
            subject = plan.subject(dtype, "cpu")
        sizes = [(each.numel(), each.requires_grad) for each in subject.model.parameters()]
        return cls(
            sum(count for count, _ in sizes),
            sum(count for count, trained in sizes if trained),
            {name: work.tokens for name, work in subject.works.items()},
        )

    def fits(self, sides: int, dtype: torch.dtype, there: int) -> bool:
        """Whether so many processes fit, the last of which builds its model in float32."""
        gradients = self.trained if STEP in self.tokens else 0
        running = dtype.itemsize * (self.parameters + gradients) + OVERHEAD
        building = 4 * self.parameters + OVERHEAD
        return (sides - 1) * running + max(running, building) <= there


def asked(*, compiled: bool = False, quantized: bool = False, folded: bool = False) -> list[str]:
    """The sides, the model as it is first."""
    optional = {COMPILED: compiled, FROZEN: compiled, INT8: quantized, FOLDED: folded}
    return [side for side in SIDES if optional.get(side, True)]


def lacking_memory(size: Size, dtype: torch.dtype) -> str:
    """Why a model cannot be timed here, or an empty string."""
    there = available()
    if there is None or size.fits(2, dtype, there):
        return ""
    return f"does not fit twice, {gibibytes(there)} are free"


def run(plan: Plan, size: Size, *, dtype: torch.dtype, seconds: float, sides: list[str]) -> Apart:
    """Time a model on a cpu.

    Args:
        plan, size: the model.
        dtype: of its weights and inputs.
        seconds: how long to time one kind of work, all sides together.
        sides: of `SIDES`, the model as it is first.
    """
    found = Apart(
        plan.name, dtype_name(dtype), plan.sizes, size.parameters, conditions_on("cpu"), tokens=size.tokens
    )
    there = available()
    together = there is None or size.fits(len(sides), dtype, there)
    others = [side for side in sides if side != BEFORE]
    groups = [others] if together else [[side] for side in others]
    progress = ProgressBar(len(groups) * (1 + len(size.tokens)))
    with _process(plan, dtype, BEFORE) as before:
        for group in groups:
            with ExitStack() as stack:
                progress(f"{', '.join(group)}: starting")
                ends = {BEFORE: before}
                ends |= {side: stack.enter_context(_process(plan, dtype, side)) for side in group}
                for work in size.tokens:
                    progress(f"{work} of {', '.join(group)}: timing")
                    _time(found, work, ends, seconds * len(ends) / len(sides), together)
    progress.close()
    return found


def _time(found: Apart, work: str, ends: Mapping[str, Connection], seconds: float, together: bool) -> None:
    """One work of the processes at `ends`."""
    calls: dict[str, Call] = {}
    results: dict[str, Tensor] = {}
    for side, end in ends.items():
        if work == STEP and side in (FROZEN, INT8, FOLDED):  # what is trained is none of these
            continue
        answer = _ask(end, work)
        if isinstance(answer, str):
            found.failed.setdefault(work, {})[side] = answer
            continue
        numbers, found.peak.setdefault(work, {})[side] = answer
        calls[side], results[side] = partial(_sample, end), torch.tensor(numbers)
    if work != GENERATION:  # where one token is another, all that follow are
        found.differences.setdefault(work, {}).update(_differences(results))
    if not calls:
        return
    rounds = LONG_ROUNDS if work == GENERATION else 5
    times = interleave(calls, seconds=seconds, least_rounds=rounds, clock=lambda sample, _: sample())
    if not together and BEFORE in times:
        before = times[BEFORE]
        found.beside.setdefault(work, {}).update({side: before for side in times if side != BEFORE})
    found.times[work] = times | found.times.get(work, {})
    found.times[work] = {side: found.times[work][side] for side in SIDES if side in found.times[work]}


def _patched(model: nn.Module) -> None:
    patch(model)


def _with_linears(model: nn.Module) -> None:
    patch(model, linears=True)


def _folded(model: nn.Module) -> None:
    patch(model, linears=True)
    fold(model.eval())


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
    FOLDED: _folded,
    INT8: _with_integers,
}


@contextmanager
def _process(plan: Plan, dtype: torch.dtype, side: str) -> Iterator[Connection]:
    """A process that serves one side until its end is closed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = plan, dtype, side, torch.get_num_threads(), theirs
    process = context.Process(target=_serve, args=arguments, daemon=True)
    try:
        process.start()
        theirs.close()
        yield ours
    finally:
        ours.close()
        process.join(5)
        process.kill()
        process.join()


def _differences(results: dict[str, Tensor]) -> dict[str, float]:
    if BEFORE not in results:
        return {}
    before = results[BEFORE]
    return {
        side: float((each - before).norm() / before.norm())
        for side, each in results.items()
        if side != BEFORE
    }


def _ask(end: Connection, request: str | bool) -> Any:
    try:
        end.send(request)
        return end.recv()
    except (EOFError, ConnectionError):
        return "its process ended"


def _sample(end: Connection) -> Any:
    time.sleep(PAUSE)
    return _ask(end, True)


def _serve(plan: Plan, dtype: torch.dtype, side: str, threads: int, end: Connection) -> None:
    """In its process: build a side, then get ready what a request names, and time a call for each True."""
    torch.set_num_threads(threads)
    why = ""
    try:
        subject = plan.subject(dtype, "cpu")
        SIDES[side](subject.model)
    except Exception as error:
        why = first_line(error)
    timed: Call = bool
    last: float | None = None
    with suppress(EOFError):
        while request := end.recv():
            if why:
                end.send(why)
            elif request is True:
                last = host_clock(timed, last)
                end.send(last)
            else:
                try:
                    timed, last = call(request, subject.works[request], subject.model), None
                    end.send(_warm(timed, 1 if request == GENERATION else WARM))
                except Exception as error:
                    end.send(first_line(error))


def _warm(timed: Callable[[], tuple[Tensor, ...]], calls: int) -> tuple[list[float], int | None]:
    """The last numbers of a call's result, and the most memory that is held meanwhile."""
    for _ in range(calls - 1):
        timed()
    *_, result = timed()  # logits, tokens, or of a training step the last gradient
    numbers = result.flatten()[-COMPARED:].double().tolist()
    del result
    return numbers, peak_resident(timed)
