"""Every operator on every backend of this machine against float64: `python -m flamingo_kernels check`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._backends import dispatch, env
from ..testing import CASES as EXAMPLES
from ..testing import (
    DTYPES,
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Int8LinearCase,
    LinearCase,
    MaskedCrossAttentionCase,
    Measurement,
    PerceiverAttentionCase,
    measure,
    severity,
)
from . import info
from .measure.text import dtype_name

# Shapes of real use and awkward ones for each operator.
CASES: list[Case] = [
    MaskedCrossAttentionCase(length=256, media=4, latents=64, heads=8, head_dim=64),
    MaskedCrossAttentionCase(
        length=111, latents=60, head_dim=40, groups=2, immediate=False, policy="open_flamingo", layout="slice"
    ),
    PerceiverAttentionCase(queries=64, features=256, latents=64, heads=8, head_dim=64),
    PerceiverAttentionCase(clips=3, features=63, groups=2, lengths=(0, 7, 63), layout="transposed"),
    GatedResidualCase(shape=(256, 2048)),
    GatedResidualCase(shape=(111, 63), gate=(63,), layout="strided"),
    GatedBlockDecodeCase(batch=1, dim=2048, hidden=8192, media=5, latents=64, heads=8, head_dim=64),
    GatedBlockDecodeCase(batch=9, dim=63, hidden=65, head_dim=40, groups=2, immediate=False, layout="slice"),
    GatedBlockDecodeCase(
        dim=256, media=1, latents=1601, heads=8, groups=4, head_dim=64, rms=True, q_norm=True, glu=True
    ),
    GatedBlockDecodeCase(batch=6, texts=3, dim=256, hidden=512, integers=True, bias=True),
    LinearCase(rows=(1,), width=2048, out=1024, activation="gelu"),
    LinearCase(rows=(3, 6), width=63, out=65, residual=True, gate=(65,), layout="slice"),
    Int8LinearCase(rows=(1,), width=2048, out=1024, activation="gelu"),
    Int8LinearCase(rows=(3, 6), width=63, out=65, residual=True, gate=(65,)),
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
            "dtype": dtype_name(self.dtype),
            "case": str(self.case),
            "tensor": self.worst.name,
            "error": self.worst.error,
            "rounding": self.worst.rounding,
            "budget": self.worst.budget,
            "passed": self.worst.passed,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """The command `check`: hold every operator, backend and dtype to its error budget.

    Returns:
        0 if every output and gradient is within its budget, else 1.

    Raises:
        ValueError: there is no such device.
    """
    info.expect_device(options.device)
    info.tell_of_no_kernels("check")
    found = _as_json(options.device) if options.json else _as_table(options.device)
    return 0 if _passed(found) else 1


def _as_json(device: str) -> list[Row]:
    found = list(rows(device))
    named = [row.as_dict() for row in found]
    print(json.dumps({"passed": _passed(found), "rows": named, "not_run": not_run(device)}))
    return found


def _as_table(device: str) -> list[Row]:
    """Prints each row as soon as it is known."""
    print(_LINE.format("operator", "backend", "dtype", "worst in", "error", "rounding", "budget", "result"))
    found = []
    for row in rows(device):
        print(_render(row), flush=True)
        found.append(row)
    for backend, reason in not_run(device).items():
        print(f"not run: {backend}: {reason}")
    print(
        "error: largest difference to float64, forward and backward; rounding: what its dtype may cost; "
        f"budget: 2 x rounding + 1 ulp; {'all passed' if _passed(found) else 'FAILED'}"
    )
    return found


def _passed(found: list[Row]) -> bool:
    return all(row.worst.passed for row in found)


_LINE = "{:<24} {:<18} {:<9} {:<10} {:>8}  {:>8}  {:>8}  {}"


def rows(device: str = "cpu") -> Iterator[Row]:
    """One row for each operator, backend and dtype that runs on a device."""
    for operator in dispatch.operators():
        for backend, able in backends_on(device, operator).items():
            for dtype in DTYPES if able is True else ():
                cases = [case for case in _cases_for(backend) if case.operator == operator]
                found = [_row(replace(case, dtype=dtype, device=device), backend) for case in cases]
                yield max(found, key=lambda row: severity(row.worst))


def _cases_for(backend: str) -> list[Case]:
    if info.variant(backend) in ("triton/interpreter", "cuda/emulation"):  # slow: the smallest have to do
        return [example() for example in EXAMPLES.values()]
    return CASES


def _row(case: Case, backend: str) -> Row:
    worst = max(measure(case, backend), key=severity)
    return Row(case.operator, info.variant(backend), case.dtype, case, worst)


def backends_on(device: str, operator: str) -> dict[str, bool | str]:
    """Which backends run an operator's tensors on a device: True, or the reason why not."""
    tensors = EXAMPLES[operator](device=device).tensors().values()
    found: dict[str, bool | str] = {}
    for backend in env.BACKENDS:
        try:
            found[backend] = bool(dispatch.resolve(operator, backend, *tensors))
        except dispatch.UnsupportedError as error:
            found[backend] = "; ".join(error.reasons[backend])
    return found


def not_run(device: str = "cpu") -> dict[str, str]:
    """Why the other backends ran nothing."""
    every = [backends_on(device, operator) for operator in dispatch.operators()]
    ran = {backend for each in every for backend, able in each.items() if able is True}
    return {backend: str(why) for backend, why in every[0].items() if backend not in ran}


def _render(row: Row) -> str:
    numbers = [f"{value:.1e}" for value in (row.worst.error, row.worst.rounding, row.worst.budget)]
    result = "ok" if row.worst.passed else f"FAILED: {row.case}"
    return _LINE.format(row.operator, row.backend, dtype_name(row.dtype), row.worst.name, *numbers, result)
