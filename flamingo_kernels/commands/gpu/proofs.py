"""What is proved of one call on a device: that it is right, repeatable, and safe in a CUDA graph."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backends import dispatch
from ...mask import MediaMask
from ...testing import Case, Measurement, Outputs, Tensors, evaluate, measure, measure_call, severity
from .. import info
from ..measure.text import dtype_name, first_line, gibibytes

FAR = 2**31  # elements, the first that a 32-bit offset does not reach


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one proof of one case came to.

    Attributes:
        check: name of the proof.
        operator, backend, dtype, case: what it is about.
        status: "ok", "failed", "skipped" (it cannot run here) or "late" (no time was left).
        detail: why not ok.
        tensor, error, rounding, budget: of the worst tensor, where the proof is one of accuracy.
    """

    check: str
    operator: str
    backend: str
    dtype: str
    case: str
    status: str
    detail: str = ""
    tensor: str = ""
    error: float | None = None
    rounding: float | None = None
    budget: float | None = None
    spent: float | None = None


class Task(NamedTuple):
    """One proof to be made."""

    check: str
    case: Case
    backend: str

    def finding(self, status: str, detail: str = "", worst: Measurement | None = None) -> Finding:
        case = str(dataclasses.replace(self.case, dtype=Case.dtype))  # without the dtype
        what = (self.check, self.case.operator, info.variant(self.backend), dtype_name(self.case.dtype), case)
        if worst is None:
            return Finding(*what, status, detail)
        numbers = (worst.name, worst.error, worst.rounding, worst.budget, worst.spent)
        return Finding(*what, status, detail, *numbers)


class NotHere(Exception):
    """A proof that cannot be made here, and why."""


def perform(task: Task) -> Finding:
    """Make a proof; whatever goes wrong in it is what it found."""
    torch.set_float32_matmul_precision("highest")  # no tf32
    try:
        worst = PROOFS[task.check](task.case, task.backend)
    except (NotHere, dispatch.UnsupportedError) as reason:
        return task.finding("skipped", str(reason))
    except Exception as error:
        return task.finding("failed", first_line(error))
    return task.finding("ok" if worst is None or worst.passed else "failed", worst=worst)


def parity(case: Case, backend: str) -> Measurement:
    """Outputs and gradients keep the error budget, in memory that starts as NaN."""
    with poison():
        return max(measure(case, backend), key=severity)


def far(case: Case, backend: str) -> Measurement:
    """Where tensors have more than 2^31 elements, the last sequence keeps the error budget.

    The sequences before it are random and not looked at; nor are the gradients of tensors they share.
    """
    tensors = case.tensors()
    copies = FAR // max(tensor.numel() for tensor in tensors.values()) + 2
    _expect_memory(5 * copies * sum(tensor.nbytes for tensor in tensors.values()), case.device)
    measured = measure_call(case, _last_of(copies, case, backend))
    shared = [f"d{name}" for name, tensor in tensors.items() if tensor.ndim == 1]
    return max((each for each in measured if each.name not in shared), key=severity)


def _last_of(copies: int, case: Case, backend: str) -> Callable[..., Outputs]:
    """The operator on a case that is the end of a much larger one."""
    options = {name: _repeated(option, copies) for name, option in case.options().items()}

    def call(**tensors: Tensor) -> Outputs:
        large = {name: _behind_noise(tensor, copies) for name, tensor in tensors.items()}
        outputs = case.call(large, options, backend)
        size = next(iter(tensors.values())).shape[0]
        return tuple(out[-size:] for out in outputs)

    return call


def _behind_noise(tensor: Tensor, copies: int) -> Tensor:
    if tensor.ndim == 1:
        return tensor
    size, *rest = tensor.shape
    noise = tensor.new_empty((copies - 1) * size, *rest).normal_()
    return torch.cat([noise, tensor])


def _repeated(option: Any, copies: int) -> Any:
    if isinstance(option, Tensor):
        return option.repeat(copies)
    if not isinstance(option, MediaMask):
        return option
    spans = {name: getattr(option, name).repeat(copies, 1) for name in ("lo", "hi", "start", "stop")}
    return dataclasses.replace(option, **spans)


def _expect_memory(needed: int, device: str) -> None:
    if torch.device(device).type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise NotHere(f"it takes about {gibibytes(needed)}, {gibibytes(free)} are free")


class Call:
    """A call of an operator whose inputs stay where they are, so that it can be made again and again."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.tensors, self.options = case.tensors(), case.options()
        self.douts = case.douts(self.forward())

    @torch.no_grad()
    def forward(self) -> Outputs:
        return self._operator(**self.tensors)

    def both(self) -> Tensors:
        """Outputs and gradients."""
        return evaluate(self.case, self._operator, self.tensors, self.douts)

    def read(self, other: Call) -> None:
        """Copy in what another call reads."""
        for place, value in zip(self._places(), other._places(), strict=True):
            place.copy_(value)

    def _operator(self, **tensors: Tensor) -> Outputs:
        return self.case.call(tensors, self.options, self.backend)

    def _places(self) -> Iterator[Tensor]:
        yield from self.tensors.values()
        yield from self.douts
        for option in self.options.values():
            if isinstance(option, MediaMask):
                yield from (option.lo, option.hi, option.start, option.stop)
            elif isinstance(option, Tensor):
                yield option


def repeats(case: Case, backend: str) -> None:
    """Three calls give the same bits."""
    call = Call(case, backend)
    expected = call.both()
    for _ in range(2):
        expect_same(call.both(), expected)


def another_stream(case: Case, backend: str) -> None:
    """A call on a stream of its own, behind the work that makes its inputs there, gives the same bits."""
    call = Call(case, backend)
    expected = call.both()
    fresh = Call(dataclasses.replace(case, seed=case.seed + 1), backend)
    with a_stream(case.device):
        fresh.read(call)
        found = fresh.both()
    expect_same(found, expected)


def another_device(case: Case, backend: str) -> None:
    """A call gives the same bits while another device than its tensors' is the current one."""
    call = Call(case, backend)
    expected = call.both()
    with elsewhere(case.device):
        found = call.both()
    expect_same(found, expected)


def graph(case: Case, backend: str) -> None:
    """A captured call, forward and with its gradients, replayed on new inputs is a plain call bit for bit."""
    call, other = Call(case, backend), Call(dataclasses.replace(case, seed=case.seed + 1), backend)
    expected = other.both()
    forward, replay_forward = capture(call.forward, case.device)
    both, replay_both = capture(call.both, case.device)
    for stale in (*forward, *both.values()):
        stale.fill_(torch.nan)
    call.read(other)
    replay_forward()
    replay_both()
    expect_same(dict(zip(case.outputs, forward, strict=True)), expected)
    expect_same(both, expected)


PROOFS: dict[str, Callable[[Case, str], Measurement | None]] = {
    "parity": parity,
    "past 2^31 elements": far,
    "repeats": repeats,
    "another stream": another_stream,
    "another device": another_device,
    "graph": graph,
}


def expect_same(found: Tensors, expected: Tensors) -> None:
    """Raise AssertionError unless every tensor found is what was expected to the last bit, NaN included."""
    for name, tensor in found.items():
        same = torch.equal(tensor.isnan(), expected[name].isnan())
        if not same or not torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()):
            raise AssertionError(f"{name} is not the same to the last bit")


@contextmanager
def poison() -> Iterator[None]:
    """Fresh memory starts as NaN, so that it shows what a kernel leaves unwritten."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operators without a deterministic algorithm
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def a_stream(device: str) -> Iterator[None]:
    """Work on another stream than the default one, which waits for it at the end."""
    if torch.device(device).type != "cuda":
        raise NotHere("a cpu has no streams")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@contextmanager
def elsewhere(device: str) -> Iterator[None]:
    """Another GPU is the current one."""
    if torch.device(device).type != "cuda" or torch.cuda.device_count() < 2:
        raise NotHere("there is no second GPU")
    index = torch.device(device).index or 0
    with torch.cuda.device((index + 1) % torch.cuda.device_count()):
        yield


def capture(call: Callable[[], Any], device: str) -> tuple[Any, Callable[[], None]]:
    """A call as a CUDA graph: its results, which are written at every replay, and the replay."""
    if torch.device(device).type != "cuda":
        raise NotHere("a cpu has no graphs")
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compilation and allocation come before the capture
            call()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            results = call()
    return results, recorded.replay
