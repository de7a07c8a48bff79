"""What kernels are launched with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flamingo_kernels.testing import (
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
)

pytest.importorskip("triton", reason="the Triton backend is optional")

from flamingo_kernels._backends.triton import launch

MASKED = MaskedCrossAttentionCase(policy="open_flamingo")
# Calls of one model: texts and batches of other sizes, some of which are 1 or multiples of 16.
CALLS: list[tuple[Case, ...]] = [
    tuple(
        replace(MASKED, immediate=immediate, batch=batch, length=length, media=media)
        for batch, length, media in ((1, 1, 1), (2, 64, 3), (16, 33, 16))
    )
    for immediate in (True, False)
]
CALLS += [
    tuple(
        PerceiverAttentionCase(queries=queries, clips=clips, features=features)
        for clips, features in ((1, 600), (2, 21), (16, 160))
    )
    for queries in (9, 300)
]
CALLS.append(tuple(GatedResidualCase(shape=(rows, 40)) for rows in (1, 7, 640)))
CALLS += [tuple(LinearCase(rows=(rows,)) for rows in each) for each in ((1, 7, 16), (65, 96, 640))]
CALLS.append(
    tuple(
        GatedBlockDecodeCase(batch=batch, media=media, q_norm=True, glu=True)
        for batch, media in ((1, 1), (3, 3), (16, 16))
    )
)


def specialised(value: Any) -> Any:
    """What Triton compiles a kernel for: of numbers in a tuple, whether they are 1 or multiples of 16."""
    if isinstance(value, tuple):
        return tuple(map(specialised, value))
    return (value == 1, value % 16 == 0) if isinstance(value, int) else None


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: f"{calls[0].operator}-{calls[0]}")
def test_other_sizes_take_the_same_kernels(calls, monkeypatch):
    seen: dict[str, set[Any]] = {}
    first: dict[str, int] = {}  # a call may launch a kernel in several ways

    def start(kernel: Any, count: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tuples = tuple(each for each in arguments if isinstance(each, tuple))
        seen.setdefault(kernel.__name__, set()).add(specialised(tuples))

    monkeypatch.setattr(launch, "start", start)
    for case in calls:
        leaves = {name: t.requires_grad_(case.differentiable) for name, t in case.tensors().items()}
        outputs = case.kernel("triton", **leaves)
        if case.differentiable:
            torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(out) for out in outputs])
        first = {name: len(kinds) for name, kinds in seen.items()} | first
    assert first
    assert {name: len(kinds) for name, kinds in seen.items()} == first


@pytest.mark.parametrize(
    ("dtype", "switch", "expected"),
    [
        (torch.float32, "none", "ieee"),
        (torch.float32, "ieee", "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.bfloat16, "tf32", "ieee"),
    ],
)
def test_float32_is_rounded_to_tf32_where_torch_is_told_to(dtype, switch, expected):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = switch
    try:
        assert launch.precision(torch.zeros(1, dtype=dtype)) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
