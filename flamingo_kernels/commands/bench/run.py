"""Runs a case: every contender is checked against float64 first, and only then timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.linear.config import choose
from ...testing import Expected, expect, prove
from .. import info
from ..info import conditions_on
from ..measure.memory import peak_growth
from ..measure.swapped import NothingSwappedError
from ..measure.text import first_line
from ..measure.timing import Clock, Spread, clock_of, interleave
from .baselines import OURS, Contender, contenders
from .floors import Ceilings, least_bytes
from .rival import Function, contender
from .rows import Key, Row, Run, Skipped
from .shapes import Case, Mode

Call = Callable[[], tuple[Tensor, ...]]


class Checked(NamedTuple):
    """A contender whose result is right: a warm call, and its error; a floor has none."""

    call: Call
    err: float | None
    budget: float | None


class Refused(NamedTuple):
    """A contender without a right result."""

    reason: str
    wrong: bool  # it gave a result, and that was wrong


class Stopped(KeyboardInterrupt):
    """Ctrl-C, and the cases that were done before it."""

    def __init__(self, found: Run) -> None:
        super().__init__(f"stopped by Ctrl-C after {len(found.cases)} cases, which are kept")
        self.found = found


def run(
    cases: Iterable[Case],
    *,
    against: Sequence[str] = (),
    rivals: Mapping[str, Function] | None = None,
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[Run], None] = lambda found: None,
    device: str = "cpu",
    clock: Clock | None = None,
    ceilings: Ceilings | None = None,
) -> Run:
    """Check and time every contender of every case.

    Args:
        cases: what to run.
        against: names of the contenders to compare with; all if empty.
        rivals: the user's own contenders beside them, by name; see `rival`.
        seconds: how long to time one case, all contenders together.
        progress: told what is going on.
        keep: given all that was found until then, after every case.
        device: where to run.
        clock: what keeps the time; the device's own by default.
        ceilings: what the device reaches, to judge ours by; None to leave that out.

    Raises:
        Stopped: by Ctrl-C.
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    clock = clock or clock_of(device)
    for case in cases:
        try:
            found = _run_case(case, against, rivals or {}, seconds, progress, device, clock, ceilings)
        except RuntimeError as error:  # the device is out of memory, or worse
            found = without(case, first_line(error))
        except KeyboardInterrupt:
            raise Stopped(Run(rows, skipped)) from None
        rows, skipped = rows + found.rows, skipped + found.skipped
        keep(Run(rows, skipped))
        _clean_up(against, device)
    return Run(rows, skipped)


def _run_case(
    case: Case,
    against: Sequence[str],
    rivals: Mapping[str, Function],
    seconds: float,
    progress: Callable[[str], None],
    device: str,
    clock: Clock,
    ceilings: Ceilings | None,
) -> Run:
    progress(f"{case}: checking")
    sound, refused = check(case, against, device, rivals)
    skipped = [Skipped(*_key(case), name, each.reason, each.wrong) for name, each in refused.items()]
    if OURS not in sound:
        alone = [Skipped(*_key(case), name, "nothing to compare with", refused=False) for name in sound]
        return Run([], skipped + alone)
    progress(f"{case}: timing")
    calls = {name: each.call for name, each in sound.items()}
    spreads = interleave(calls, seconds=seconds, least_rounds=3, clock=clock)
    return Run(_rows(case, sound, spreads, device, ceilings), skipped)


def without(case: Case, why: str) -> Run:
    """What is left of a case that was not timed."""
    return Run([], [Skipped(*_key(case), OURS, why, refused=False)])


def _key(case: Case) -> Key:
    return Key(case.op, case.shape, case.dtype, case.mode)


def _clean_up(against: Sequence[str], device: str) -> None:
    if not against or {"compile", "flex"} & set(against):
        torch.compiler.reset()  # or it would soon refuse to compile yet another shape
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _rows(
    case: Case,
    sound: dict[str, Checked],
    spreads: dict[str, Spread],
    device: str,
    ceilings: Ceilings | None,
) -> list[Row]:
    conditions = conditions_on(device)
    moved = least_bytes(case)
    floor_ms = moved / ceilings.copy_gb_s / 1e6 if moved and ceilings else 0.0
    return [
        Row(
            *_key(case),
            name,
            *spreads[name],
            ratio=spreads[name].median / spreads[OURS].median,
            extra_mib=_extra_mib(each.call, device),
            err=each.err,
            budget=each.budget,
            variant=_variant(case, device) if name == OURS else "",
            least_bytes=moved,
            floor_share=floor_ms / spreads[name].median or None,
            **conditions,
        )
        for name, each in sound.items()
    ]


def prepare(task: tuple[Case, str, str]) -> None:
    """Call a contender of a case on a device once, for what it leaves on disk: compiled code."""
    case, name, device = task
    makers = contenders(case, device=device)
    with suppress(Exception):  # it will be met again, and reported, when the contender is checked
        if name in makers:
            call_of(makers[name](), case.mode)()
    torch.compiler.reset()


def check(
    case: Case,
    against: Sequence[str] = (),
    device: str = "cpu",
    rivals: Mapping[str, Function] | None = None,
) -> tuple[dict[str, Checked], dict[str, Refused]]:
    """Hold the contenders of a case against float64: those within the error budget, and the others."""
    exact = call_of(contenders(case, torch.float64, device)["eager"](), case.mode)()
    makers = contenders(case, device=device)
    eager = makers["eager"]()
    expected = _expected(eager, case.mode, exact)
    makers = {name: make for name, make in makers.items() if not against or name in (OURS, *against)}
    makers |= {name: partial(contender, each, case, eager) for name, each in (rivals or {}).items()}
    sound: dict[str, Checked] = {}
    refused: dict[str, Refused] = {}
    for name in makers:
        try:
            rival = makers[name]()
            if not rival.same and case.mode not in rival.modes:
                continue
            call = call_of(rival, case.mode)
            result = call()
        except NothingSwappedError:
            raise
        except Exception as error:  # whatever a contender fails with is why it has no row
            refused[name] = Refused(first_line(error), wrong=False)
            continue
        if not rival.same:
            sound[name] = Checked(call, None, None)
            continue
        checked = _judge(call, result, expected, rival.budget)
        if isinstance(checked, Checked):
            sound[name] = checked
        else:
            refused[name] = checked
    return sound, refused


def _expected(eager: Contender, mode: Mode, exact: tuple[Tensor, ...]) -> Expected:
    """What rounding costs eager; for gradients that of the forward pass before them too."""
    call = call_of(eager, "forward+backward" if mode == "backward" else mode)
    return expect(lambda: call()[-len(exact) :], exact)


def _judge(
    call: Call, result: tuple[Tensor, ...], expected: Expected, budget: float | None
) -> Checked | Refused:
    try:
        proof = prove(result, expected)
    except AssertionError as error:
        return Refused(str(error), wrong=True)
    allowed = proof.budget if budget is None else budget
    if proof.passed or proof.err <= allowed:
        return Checked(call, proof.err, allowed)
    return Refused(f"relative error {proof.err:.1e} against float64, budget {allowed:.1e}", wrong=True)


def call_of(contender: Contender, mode: Mode) -> Call:
    """Gives the contender's outputs ("forward"), its gradients ("backward") or both."""

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return _tuple(contender.call())

    if mode == "forward":
        return forward
    douts = _douts(forward())

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = _tuple(contender.call())
        gradients = torch.autograd.grad(outputs, contender.wrt, douts)
        return *(output.detach() for output in outputs), *gradients

    if mode == "forward+backward":
        return forward_backward
    outputs = _tuple(contender.call())
    return lambda: torch.autograd.grad(outputs, contender.wrt, douts, retain_graph=True)


def _douts(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients for these outputs, the same numbers in every dtype.

    They are rounded to bfloat16 for that. They are around 1, so that the sum for a gate does not cancel.
    """
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    numbers = (torch.randn(out.shape, generator=generator, device=device) for out in outputs)
    return [(1 + each).bfloat16().to(out) for each, out in zip(numbers, outputs, strict=True)]


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _extra_mib(call: Call, device: str) -> float | None:
    kept: list[int] = []
    growth = peak_growth(lambda: kept.extend(tensor.nbytes for tensor in call()), device)
    return None if growth is None else max(growth - sum(kept), 0) / 2**20


def _variant(case: Case, device: str) -> str:
    """What ours runs on here; a layer takes what its attention takes."""
    if case.op == "linear" and torch.device(device).type == "cpu":
        return info.variant(choose("forward", getattr(torch, case.dtype), case.sizes["rows"]))
    attention = {
        "linear, int8": "linear",
        "GatedCrossAttentionBlock": "masked_cross_attention",
        "its cross-attention sublayer": "masked_cross_attention",
        "its decode step": "masked_cross_attention",
        "PerceiverResampler": "perceiver_attention",
    }
    sizes = {"head_dim": case.sizes["d"]} if "d" in case.sizes else {}
    return info.backend_in_use(
        attention.get(case.op, case.op), device, dtype=getattr(torch, case.dtype), **sizes
    )
