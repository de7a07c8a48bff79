"""What a kernel is held to: one rule for every operator, backend, dtype and gradient.

All errors are measured against float64::

    error(kernel) <= 2 * rounding + 1 ulp

An error is the largest absolute difference within one tensor. Inputs are rounded to the dtype first, and
the exact values are computed in float64 from the rounded inputs, so that only the arithmetic is judged.
`rounding` is how far rounding in that dtype can put eager off, whatever the order of its sums
(`rounding.py`): it follows from the numbers, not from a processor, a library or luck. An ulp is the spacing
of the tensor's dtype at its largest exact value, as a kernel may round a result once where eager need not.
What is exactly zero in every order has no excuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Outputs, Tensors
from .rounding import rounding_errors


@dataclass(frozen=True)
class Measurement:
    """How far one output or gradient is from the exact values, and how far it may be.

    Attributes:
        name: an output's, or "d" and an input's.
        error: of the kernel, the largest absolute difference to float64.
        rounding: how far rounding in its dtype can put it, see `rounding_errors`.
        ulp: spacing of the dtype at the largest exact value.
    """

    name: str
    error: float
    rounding: float
    ulp: float

    @property
    def budget(self) -> float:
        return 2 * self.rounding + self.ulp

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    @property
    def spent(self) -> float:
        """The share of the budget that the error takes: above 1, or NaN, is a failure."""
        return self.error / self.budget if self.budget else (0.0 if self.error == 0 else math.inf)

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return (
            f"{self.name:<10} error {self.error:.2e}  budget {self.budget:.2e} = "
            f"2 x {self.rounding:.2e} (rounding) + {self.ulp:.2e} (ulp)  {verdict}"
        )


def measure(case: Case, backend: str = "auto") -> list[Measurement]:
    """Run a case forward and backward by the kernel, and hold it against float64.

    Args:
        case: what to run.
        backend: of the kernel.

    Returns:
        One Measurement for each output and for the gradient of each input that has one.

    Raises:
        AssertionError: an output has another shape or dtype than eager's.

    Example:
        >>> from flamingo_kernels.testing import GatedResidualCase, measure
        >>> for each in measure(GatedResidualCase(), "reference"):
        ...     print(each.name, each.passed)
        out True
        dx True
        dy True
        dgate True
    """
    return measure_call(case, partial(case.kernel, backend))


def measure_call(case: Case, kernel: Callable[..., Outputs]) -> list[Measurement]:
    """`measure` of another call than the operator's own: `kernel` takes the tensors of the case."""
    tensors, douts = _inputs(case)
    found, exact, excess = evaluate(case, kernel, tensors, douts), _exact(case), case.excess()
    return [
        compare(name, found[name], right, rounding + excess)
        for (name, right), rounding in zip(exact.items(), _rounding(case), strict=True)
    ]


def _inputs(case: Case) -> tuple[Tensors, Outputs]:
    """The tensors of a case, and gradients for its outputs."""
    tensors = case.tensors()
    with torch.no_grad():
        return tensors, case.douts(case.eager(**tensors))


def _exact(case: Case) -> Tensors:
    tensors, douts = _inputs(case)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    return evaluate(case, case.eager, doubles, [dout.double() for dout in douts])


@lru_cache(maxsize=4096)
def _rounding(case: Case) -> list[float]:
    """What rounding may cost each output and gradient; the same for every backend."""
    tensors, douts = _inputs(case)
    exact = list(_exact(case).values())
    return rounding_errors(lambda: list(evaluate(case, case.eager, tensors, douts).values()), exact)


def evaluate(
    case: Case, function: Callable[..., Outputs], tensors: Tensors, douts: Iterable[Tensor]
) -> Tensors:
    """The outputs of `function(**tensors)` by name, and gradients, if there are any, under "d" + the tensor.

    Raises:
        AssertionError: an output has another shape or dtype than its gradient.
    """
    leaves = {name: tensor.detach().requires_grad_(case.differentiable) for name, tensor in tensors.items()}
    outputs, douts = function(**leaves), tuple(douts)
    for name, out, dout in zip(case.outputs, outputs, douts, strict=True):
        if (out.shape, out.dtype) != (dout.shape, dout.dtype):
            raise AssertionError(
                f"{name}: expected shape {tuple(dout.shape)} and {dout.dtype} like eager, "
                f"got {tuple(out.shape)} and {out.dtype}."
            )
    named = dict(zip(case.outputs, (out.detach() for out in outputs), strict=True))
    if not case.differentiable:
        return named
    gradients = torch.autograd.grad(outputs, list(leaves.values()), douts, materialize_grads=True)
    return named | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def compare(name: str, found: Tensor, exact: Tensor, rounding: float) -> Measurement:
    """Hold one tensor against the exact values."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return Measurement(name, _error(found, exact), rounding, ulp(largest, found.dtype))


def _error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next larger number of a dtype; 0 for 0.

    Example:
        >>> ulp(1.0, torch.bfloat16), ulp(0.0, torch.float32)
        (0.0078125, 0.0)
    """
    if value == 0:
        return 0.0
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(value), info.tiny))[1] - 1
    return math.ldexp(info.eps, exponent)


def severity(measurement: Measurement) -> tuple[bool, float]:
    """What sorts measurements: failures last, NaN among them."""
    return not measurement.passed, measurement.spent


def assert_within_budget(case: Case, backend: str = "auto") -> None:
    """Measure a case, print every error and budget, and fail if one exceeds it.

    Raises:
        AssertionError: with every measurement of the case, those that failed first.
    """
    assert_all_passed(measure(case, backend), f"{case.operator}, {backend}, {case}")


def assert_all_passed(measured: Sequence[Measurement], what: str) -> None:
    """Print every error and budget, and fail if one exceeds it.

    Raises:
        AssertionError: with every measurement, those that failed first.
    """
    report = "\n".join([what, *map(str, sorted(measured, key=severity, reverse=True))])
    print(report)
    if not all(each.passed for each in measured):
        raise AssertionError(f"error budget exceeded: {report}")


class Expected(NamedTuple):
    """What several results should be: exactly, in which dtypes, and how far rounding can put each."""

    exact: Sequence[Tensor]
    dtypes: list[torch.dtype]
    rounding: list[float]

    def part(self, begin: int, end: int) -> Expected:
        """What is expected of the results from one place to another."""
        return Expected(self.exact[begin:end], self.dtypes[begin:end], self.rounding[begin:end])


def expect(
    run: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], draws: int | None = None
) -> Expected:
    """What is expected of all that compute the same as `run`, given its results in float64.

    The kernels of a library in `run` may lose more than rounding need, as some of torch keep sums in half:
    what they lose here counts as rounding.
    """
    found = run()
    own = [_error(each, right) for each, right in zip(found, exact, strict=True)]
    drawn = rounding_errors(run, exact, draws)
    return Expected(
        exact, [each.dtype for each in found], [max(pair) for pair in zip(drawn, own, strict=True)]
    )


class Proof(NamedTuple):
    """The worst of several results: its error as a share of its largest exact value, and what that may be."""

    err: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.err <= self.budget


def prove(found: Sequence[Tensor], expected: Expected) -> Proof:
    """Hold several results against float64, each by its budget.

    Raises:
        AssertionError: another number, shape or dtype of tensors than expected.
    """
    kinds = [(tuple(each.shape), each.dtype) for each in found]
    wanted = [(tuple(each.shape), dtype) for each, dtype in zip(expected.exact, expected.dtypes, strict=True)]
    if kinds != wanted:
        raise AssertionError(f"expected tensors like eager's, {wanted}, got {kinds}.")
    triples = zip(found, expected.exact, expected.rounding, strict=True)
    measured = [compare("", *each) for each in triples]
    worst = max(range(len(measured)), key=lambda i: severity(measured[i]))
    exact = expected.exact[worst]
    largest = (exact.abs().max().item() if exact.numel() else 0) or 1.0
    return Proof(measured[worst].error / largest, measured[worst].budget / largest)
