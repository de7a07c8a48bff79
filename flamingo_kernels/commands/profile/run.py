"""Profiles a model before and after `patch`: compares the results, and goes on only if they are the same."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ...patch import PatchReport, patch
from ...quantize import QuantizeReport, quantize
from ...testing import Proof, expect, prove
from ..info import conditions_on
from ..measure.memory import peak_growth, saved_bytes
from ..measure.progress import ProgressBar
from ..measure.swapped import swapped
from ..measure.text import dtype_name
from ..measure.timing import Clock, Spread, clock_of, interleave
from . import report
from .exact import in_float64
from .parts import PARTS, device_time, each_part, host_time, labels, time_by_part
from .sides import BEFORE, INT8, LINEARS, PATCHED
from .subject import STEP, Plan, Subject, Work

PROFILED = 5  # calls of every work and side under torch.profiler, whose events take seconds to read

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Measured:
    """One kind of work; dictionaries are by side.

    Attributes:
        tokens, note: see `Work`.
        times: milliseconds of one call.
        peak: bytes taken at the peak beyond what is there before the call; None where that is not known.
        saved: bytes kept from the forward for the backward pass; empty where there is none.
        parts: milliseconds by part, under torch.profiler and with its cost.
    """

    tokens: int
    note: str
    times: dict[str, Spread]
    peak: dict[str, int | None]
    saved: dict[str, int]
    parts: dict[str, dict[str, float]]

    def speed(self, side: str) -> Spread:
        """Tokens a second."""
        median, p20, p80 = self.times[side]
        return Spread(*(1e3 * self.tokens / each for each in (median, p80, p20)))

    def gain(self, side: str) -> float:
        """How many times as fast it is as before."""
        return self.times[BEFORE].median / self.times[side].median

    @property
    def derived(self) -> dict[str, dict[str, Any]]:
        """What JSON has beside the fields."""
        return {
            "tokens_per_s": {side: self.speed(side) for side in self.times},
            "gain": {side: self.gain(side) for side in self.times if side != BEFORE},
        }


@dataclass(frozen=True, repr=False)
class Profile:
    """What one run found; `works` is empty if the results are not the same.

    Attributes:
        patched: what `patch` says, and `quantize`.
        compiled: whether torch.compile made what was compared and timed; parts are those without it.
        by_block: whether it was compared with float64 of one block at a time, and so without a training step.
        proofs: by work and side.
        told: errors relative to float64 that no rounding of the dtype bounds, by work and side.
    """

    model: str
    dtype: str
    inputs: dict[str, list[int]]
    parameters: int
    patched: str
    conditions: dict[str, Any]
    compiled: bool
    by_block: bool
    proofs: dict[str, dict[str, Proof]]
    told: dict[str, dict[str, float]]
    works: dict[str, Measured] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return all(proof.passed for by_side in self.proofs.values() for proof in by_side.values())

    def __str__(self) -> str:
        return report.measured(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report.html_of_profile(self)


def run(
    plan: Plan,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 5.0,
    trace: str | None = None,
    clock: Clock | None = None,
    compiled: bool = False,
    quantized: bool = False,
    by_block: bool = False,
    profiled: int | None = None,
) -> Profile:
    """Profile a model.

    Args:
        plan: the model.
        dtype, device: of its weights and inputs.
        seconds: how long to time one kind of work, all sides together.
        trace: where to write a Chrome trace.
        clock: what keeps the time; the device's own by default.
        compiled: whether to compare and time every side under torch.compile.
        quantized: whether a side with weights of 8-bit integers stands beside, for inference.
        by_block: whether float64 is of one block at a time: see `in_float64`.
        profiled: calls of every work and side under torch.profiler. Default: `PROFILED`.
    """
    with _room_for_graphs() if compiled else nullcontext():
        progress = ProgressBar(6)
        progress(f"{plan.name}: building")
        subject = plan.subject(dtype, device)
        models, report = sides(subject.model)
        said = [str(report)]
        if quantized:
            models[INT8], report_of_integers = integer_twin(subject.model)
            said.append(report_of_integers.title)
        timed = {side: compiled_twin(model) for side, model in models.items()} if compiled else models
        progress("results: comparing with float64")
        proofs, told = compare(subject, timed, by_block)
        found = Profile(
            plan.name,
            dtype_name(dtype),
            {name: list(each.shape) for name, each in subject.inputs.items()},
            sum(parameter.numel() for parameter in subject.model.parameters()),
            "\n".join(said),
            conditions_on(device),
            compiled,
            by_block,
            proofs,
            told,
        )
        if found.same:
            clock = clock or clock_of(device)
            progress("parts: under torch.profiler")
            parts = by_part(subject, models, device, trace, profiled)
            for name, work in subject.works.items():
                progress(f"{name}: timing")
                found.works[name] = _measure(name, work, timed, parts[name], device, seconds, clock)
        progress.close()
        return found


def _room_for_graphs() -> AbstractContextManager[None]:
    """All sides share code, which torch.compile no longer compiles once it has eight graphs of it."""
    from torch._dynamo import config

    return cast("AbstractContextManager[None]", config.patch(recompile_limit=64))


def sides(model: nn.Module) -> tuple[dict[str, nn.Module], PatchReport]:
    """A model as it is, patched, and on a cpu with its linear layers, and what the last of these swapped."""
    models, on_cpu = {BEFORE: model}, next(model.parameters()).is_cpu
    for side in (PATCHED, LINEARS) if on_cpu else (PATCHED,):
        models[side] = twin(model)
        report = swapped(models[side], linears=side == LINEARS)
    return models, report


def integer_twin(model: nn.Module) -> tuple[nn.Module, QuantizeReport]:
    """A patched twin whose linear layers have integers of their own, and what became of them."""
    integers = twin(model)
    patch(integers)
    return integers, quantize(integers, vision=True, keep=False)


def sides_of(work: str, models: Iterable[str]) -> list[str]:
    """The sides that can do a kind of work: integers do not learn."""
    return [side for side in models if (work, side) != (STEP, INT8)]


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the model's parameters and buffers, so that patching it costs no memory."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def compiled_twin(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """A twin that runs under torch.compile."""
    compiled = twin(model)
    compiled.compile(backend=backend)
    return compiled


def call(name: str, work: Work, model: nn.Module) -> Call:
    """Logits, or the loss and every gradient."""
    with torch.no_grad():
        compute = work.start(model)
    if name != STEP:
        return torch.no_grad()(lambda: (compute(),))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> tuple[Tensor, ...]:
        loss = compute()
        return loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)

    return step


def compare(
    subject: Subject, models: Mapping[str, nn.Module], by_block: bool = False
) -> tuple[dict[str, dict[str, Proof]], dict[str, dict[str, float]]]:
    """Hold the results of every patched side against float64, and tell the errors of integers.

    Args:
        models: by side, what shares the parameters of the subject's model.
        by_block: see `in_float64`.
    """

    def results(side: str, model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
        works = subject.works.items()
        return {name: _result(name, work, model) for name, work in works if side in sides_of(name, [side])}

    ours = {side: results(side, model) for side, model in models.items() if side != BEFORE}
    with in_float64(subject.model, by_block=by_block):
        exact = results(BEFORE, subject.model)
    proofs: dict[str, dict[str, Proof]] = {}
    told: dict[str, dict[str, float]] = {}
    for name, work in subject.works.items():
        expected = expect(partial(_result, name, work, subject.model), exact[name])
        proofs[name] = {side: prove(each[name], expected) for side, each in ours.items() if side != INT8}
        if INT8 in sides_of(name, ours):
            told[name] = {INT8: _error(ours[INT8][name][0], exact[name][0])}
    return proofs, told


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _result(name: str, work: Work, model: nn.Module) -> tuple[Tensor, ...]:
    return call(name, work, model)()


def _measure(
    name: str,
    work: Work,
    models: dict[str, nn.Module],
    parts: dict[str, dict[str, float]],
    device: str,
    seconds: float,
    clock: Clock,
) -> Measured:
    models = {side: models[side] for side in sides_of(name, models)}
    calls = {side: call(name, work, model) for side, model in models.items()}
    for warm in calls.values():
        warm()
    times = interleave(calls, seconds=seconds, clock=clock)
    peak = {side: peak_growth(each, device) for side, each in calls.items()}
    saved = {side: saved_bytes(work.start(model), model) for side, model in models.items() if name == STEP}
    return Measured(work.tokens, work.note, times, peak, saved, parts)


def by_part(
    subject: Subject,
    models: dict[str, nn.Module],
    device: str,
    trace: str | None = None,
    calls: int | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by work, side and part: medians of a few calls, the sides in turn."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    labelled = {
        module: part for model in models.values() for module, part in labels(model, subject.parts).items()
    }
    spans = {(name, side): f"{name}, {side}" for name in subject.works for side in sides_of(name, models)}
    with profile(activities=activities) as recorded:
        for _ in range(calls or PROFILED):
            for (name, side), span in spans.items():
                prepared = call(name, subject.works[name], models[side])
                with each_part(labelled, record_function), record_function(span):
                    prepared()
                    if on_gpu:
                        torch.cuda.synchronize(device)
    if trace:
        recorded.export_chrome_trace(trace)
    taken = time_by_part(recorded.events(), spans.values(), device_time if on_gpu else host_time)
    return {
        name: {side: _medians(taken[spans[name, side]]) for side in sides_of(name, models)}
        for name in subject.works
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every part that the model has."""
    medians = {part: statistics.median(each[part] for each in rounds) for part in PARTS}
    return {part: median for part, median in medians.items() if median}
