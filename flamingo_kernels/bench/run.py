"""Runs a case: every contender is checked against float64 first, and only then timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import info
from .baselines import OURS, Contender, contenders
from .memory import peak_growth
from .proof import prove
from .rows import Key, Row, Run, Skipped
from .shapes import Case, Mode
from .timing import interleave

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


def run(
    cases: Iterable[Case],
    *,
    against: Sequence[str] = (),
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Run:
    """Check and time every contender of every case.

    Args:
        cases: what to run.
        against: names of the contenders to compare with; all if empty.
        seconds: how long to time one case, all contenders together.
        progress: told what is going on.
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for case in cases:
        key = Key(case.op, case.shape, case.dtype, case.mode)
        progress(f"{case}: checking")
        sound, refused = check(case, against)
        skipped += [Skipped(*key, name, each.reason, each.wrong) for name, each in refused.items()]
        if OURS not in sound:
            skipped += [Skipped(*key, name, "nothing to compare with", refused=False) for name in sound]
            continue
        progress(f"{case}: timing")
        rows += _time(key, sound, seconds)
        if not against or "compile" in against:
            torch.compiler.reset()  # or it would soon refuse to compile yet another shape
    return Run(rows, skipped)


def _time(key: Key, sound: dict[str, Checked], seconds: float) -> list[Row]:
    spreads = interleave({name: each.call for name, each in sound.items()}, seconds=seconds, least_rounds=3)
    conditions = _conditions()
    return [
        Row(
            *key,
            name,
            *spreads[name],
            ratio=spreads[name].median / spreads[OURS].median,
            extra_mib=_extra_mib(each.call),
            err=each.err,
            budget=each.budget,
            variant=_variant(key.op) if name == OURS else "",
            **conditions,
        )
        for name, each in sound.items()
    ]


def check(case: Case, against: Sequence[str] = ()) -> tuple[dict[str, Checked], dict[str, Refused]]:
    """Hold the contenders of a case against float64: those within the error budget, and the others."""
    exact = _call(contenders(case, torch.float64)["eager"](), case.mode)()
    makers = contenders(case)
    eager = _call(makers["eager"](), case.mode)()
    sound: dict[str, Checked] = {}
    refused: dict[str, Refused] = {}
    for name in [name for name in makers if not against or name in (OURS, *against)]:
        try:
            rival = makers[name]()
            call = _call(rival, case.mode)
            result = call()
        except Exception as error:  # whatever a contender fails with is why it has no row
            refused[name] = Refused(_first_line(error), wrong=False)
            continue
        if not rival.same:
            if case.mode == "forward":
                sound[name] = Checked(call, None, None)
            continue
        checked = _judge(call, result, eager, exact)
        if isinstance(checked, Checked):
            sound[name] = checked
        else:
            refused[name] = checked
    return sound, refused


def _judge(
    call: Call, result: tuple[Tensor, ...], eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> Checked | Refused:
    try:
        proof = prove(result, eager, exact)
    except AssertionError as error:
        return Refused(str(error), wrong=True)
    if proof.passed:
        return Checked(call, proof.err, proof.budget)
    return Refused(f"relative error {proof.err:.1e} against float64, budget {proof.budget:.1e}", wrong=True)


def _call(contender: Contender, mode: Mode) -> Call:
    """Gives the contender's outputs, and in "forward+backward" the gradients as well."""

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return _tuple(contender.call())

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = _tuple(contender.call())
        gradients = torch.autograd.grad(outputs, contender.wrt, douts)
        return *(output.detach() for output in outputs), *gradients

    if mode == "forward":
        return forward
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that they are the same numbers in every dtype; around 1, so that the gradient of
    # a gate is no sum that cancels.
    douts = [(1 + torch.randn(out.shape, generator=generator)).bfloat16().to(out) for out in forward()]
    return forward_backward


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _extra_mib(call: Call) -> float | None:
    kept: list[int] = []
    growth = peak_growth(lambda: kept.extend(tensor.nbytes for tensor in call()))
    return None if growth is None else max(growth - sum(kept), 0) / 2**20


def _variant(op: str) -> str:
    """What ours runs on here; a layer takes what its attention takes."""
    attention = {
        "GatedCrossAttentionBlock": "masked_cross_attention",
        "PerceiverResampler": "perceiver_attention",
    }
    return info.backends_in_use()[attention.get(op, op)]


def _conditions() -> dict[str, Any]:
    return {
        "device": info.processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": info.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class ProgressBar:
    """How many of `total` cases are done and what is going on, on one line of stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.current = total, -1, ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        case, _, _ = text.rpartition(": ")
        if case != self.current:
            self.done, self.current = self.done + 1, case
        filled = round(24 * self.done / self.total)
        line = f"{'━' * filled}{'─' * (24 - filled)} {self.done}/{self.total}  {text}"
        # On a terminal over the last one, in a log below it.
        start, end = ("\r\033[K", "") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wipe the line."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
