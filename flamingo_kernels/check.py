"""Every operator on every backend of this machine against float64: `python -m flamingo_kernels check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import _dispatch, _extension
from .testing import (
    DTYPES,
    Case,
    GatedResidualCase,
    GatedResidualNormCase,
    MaskedCrossAttentionCase,
    Measurement,
    PerceiverAttentionCase,
    measure,
)

# A shape of real use and an awkward one for each operator.
CASES: list[Case] = [
    MaskedCrossAttentionCase(length=256, media=4, latents=64, heads=8, head_dim=64),
    MaskedCrossAttentionCase(
        length=111, latents=60, head_dim=40, groups=2, immediate=False, policy="open_flamingo", layout="slice"
    ),
    PerceiverAttentionCase(queries=64, features=256, latents=64, heads=8, head_dim=64),
    PerceiverAttentionCase(clips=3, features=63, groups=2, lengths=(0, 7, 63), layout="transposed"),
    GatedResidualCase(shape=(256, 2048)),
    GatedResidualCase(shape=(111, 63), gate=(63,), layout="strided"),
    GatedResidualNormCase(shape=(256, 2048)),
    GatedResidualNormCase(shape=(111, 63), gate=(63,), norm="rms", layout="strided"),
]


@dataclass(frozen=True)
class Row:
    """The worst tensor, output or gradient, of one operator on one backend in one dtype."""

    operator: str
    backend: str
    dtype: torch.dtype
    case: Case
    worst: Measurement

    def as_dict(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "backend": self.backend,
            "dtype": str(self.dtype).removeprefix("torch."),
            "case": str(self.case),
            "tensor": self.worst.name,
            "error": self.worst.error,
            "eager_error": self.worst.eager_error,
            "budget": self.worst.budget,
            "passed": self.worst.passed,
        }


def run(as_json: bool = False) -> int:
    """Hold every operator, backend and dtype to the error budget of `flamingo_kernels.testing`.

    Args:
        as_json: print one JSON object instead of a table.

    Returns:
        0 if every output and gradient is within its budget, else 1.
    """
    found = []
    if not as_json:
        print(
            _LINE.format("operator", "backend", "dtype", "worst in", "error", "eager's", "budget", "result")
        )
    for row in rows():
        found.append(row)
        if not as_json:
            print(_render(row), flush=True)
    passed = all(row.worst.passed for row in found)
    if as_json:
        print(json.dumps({"passed": passed, "rows": [row.as_dict() for row in found], "not_run": not_run()}))
    else:
        for backend, reason in not_run().items():
            print(f"not run: {backend}: {reason}")
        print(
            "errors: largest difference to float64, forward and backward; "
            f"budget: 2 x eager's + 2 ulp; {'all passed' if passed else 'FAILED'}"
        )
    return 0 if passed else 1


_LINE = "{:<24} {:<16} {:<9} {:<10} {:>8}  {:>8}  {:>8}  {}"


def rows() -> Iterator[Row]:
    """One row for each operator, backend and dtype that runs here."""
    for operator in _dispatch.operators():
        for backend, available in _dispatch.available_backends(operator).items():
            for dtype in DTYPES if available is True else ():
                cases = [replace(case, dtype=dtype) for case in CASES if case.operator == operator]
                measured = [(each, case) for case in cases for each in measure(case, backend)]
                worst, case = max(measured, key=lambda pair: (not pair[0].passed, pair[0].spent))
                yield Row(operator, _with_variant(backend), dtype, case, worst)


def not_run() -> dict[str, str]:
    """Why the other backends did not run."""
    reasons = (_dispatch.available_backends(operator).items() for operator in _dispatch.operators())
    return {backend: why for each in reasons for backend, why in each if isinstance(why, str)}


def _with_variant(backend: str) -> str:
    return f"cpu/{_extension.cpu_variant()}" if backend == "cpu" else backend


def _render(row: Row) -> str:
    numbers = [f"{value:.1e}" for value in (row.worst.error, row.worst.eager_error, row.worst.budget)]
    result = "ok" if row.worst.passed else f"FAILED: {row.case}"
    return _LINE.format(row.operator, row.backend, str(row.dtype)[6:], row.worst.name, *numbers, result)
