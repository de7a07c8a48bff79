"""What `gpu` proves and times, and how long each part of it may take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ...testing import (
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Int8LinearCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
)
from .. import check
from ..bench import shapes
from ..bench.baselines import BACKENDS
from . import sanitizer
from .proofs import Task

DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # the one that models use first
HEAD_DIMS = (16, 40, 64, 80, 96, 128, 256)

_RULES: list[dict[str, Any]] = [
    {"immediate": immediate, "policy": policy, "times": times}
    for immediate in (True, False)
    for policy in ("zero", "open_flamingo")
    for times in ("locations", "cached", "jumps")
]
MASKED: list[Case] = [
    MaskedCrossAttentionCase(batch=4, length=1024, media=8, latents=64, heads=8, head_dim=64),
    *(MaskedCrossAttentionCase(length=111, latents=64, head_dim=d) for d in HEAD_DIMS),
    *(MaskedCrossAttentionCase(length=65, latents=r, head_dim=64) for r in (1, 100, 256, 1601)),
    *(MaskedCrossAttentionCase(length=t, media=1, latents=64) for t in (1, 63, 257)),
    *(MaskedCrossAttentionCase(length=257, media=5, latents=60, **rule) for rule in _RULES),
    MaskedCrossAttentionCase(length=300, latents=64, heads=8, head_dim=64, groups=4, immediate=False),
    *(
        MaskedCrossAttentionCase(length=70, latents=20, head_dim=40, layout=layout)
        for layout in ("slice", "transposed", "strided", "expanded")
    ),
    MaskedCrossAttentionCase(batch=0),
    MaskedCrossAttentionCase(length=0),
    MaskedCrossAttentionCase(media=0),
]
PERCEIVER: list[Case] = [
    PerceiverAttentionCase(clips=1, queries=64, features=7680, latents=64, heads=8, head_dim=64),
    PerceiverAttentionCase(clips=16, queries=64, features=256, latents=64, heads=8, head_dim=64),
    *(PerceiverAttentionCase(queries=64, features=111, latents=64, head_dim=d) for d in HEAD_DIMS),
    *(PerceiverAttentionCase(features=s, queries=64, latents=64) for s in (0, 1, 63, 257)),
    *(PerceiverAttentionCase(queries=r, latents=r, features=100, head_dim=64) for r in (1, 60, 130)),
    PerceiverAttentionCase(clips=5, features=300, lengths=(0, 7, 63, 300, 500), head_dim=64),
    PerceiverAttentionCase(clips=2, features=4000, lengths=(0, 3999), head_dim=64, groups=4),
    *(
        PerceiverAttentionCase(features=70, head_dim=40, layout=layout)
        for layout in ("slice", "transposed", "strided", "expanded")
    ),
    PerceiverAttentionCase(clips=0),
]
ROWS: list[Case] = [
    GatedResidualCase(shape=(8192, 2048)),
    GatedResidualCase(shape=(2048, 2048), gate=(2048,)),
    GatedResidualCase(shape=(7, 20000)),
    GatedResidualCase(shape=(5000, 64), gate=(64,), layout="slice"),
    GatedResidualCase(shape=(3, 50, 96), layout="transposed"),
    GatedResidualCase(shape=(100, 96), y_dtype=torch.bfloat16, gate_dtype=torch.float32),
    GatedResidualCase(shape=(0, 64)),
]
_LLAMA: dict[str, Any] = {"rms": True, "q_norm": True, "glu": True, "activation": "silu", "head_dim": 128}
DECODE: list[Case] = [
    GatedBlockDecodeCase(batch=1, dim=2048, hidden=8192, media=5, latents=64, heads=8, head_dim=64),
    GatedBlockDecodeCase(batch=8, dim=4096, hidden=400, heads=32, head_dim=128, latents=64, groups=4),
    *(
        GatedBlockDecodeCase(batch=16, dim=520, head_dim=head_dim, latents=65, gate=(520,))
        for head_dim in (40, 80, 96)
    ),
    GatedBlockDecodeCase(batch=2, dim=4096, hidden=400, heads=32, groups=4, media=4, latents=1601, **_LLAMA),
    GatedBlockDecodeCase(batch=64, activation="squared_relu", bias=True),
    GatedBlockDecodeCase(batch=8, activation="relu", texts=4, gate=None),
    GatedBlockDecodeCase(batch=9, immediate=False, policy="open_flamingo", norm_bias=False, media=5),
    GatedBlockDecodeCase(batch=3, dim=63, hidden=65, head_dim=7, latents=70),
    GatedBlockDecodeCase(batch=3, x_dtype=torch.float32, gate_dtype=torch.float32),
    GatedBlockDecodeCase(batch=4, integers=True, bias=True),
    *(GatedBlockDecodeCase(layout=layout) for layout in ("slice", "transposed", "strided", "expanded")),
    GatedBlockDecodeCase(batch=0),
    GatedBlockDecodeCase(media=0, policy="open_flamingo"),
]
LINEAR: list[Case] = [
    LinearCase(rows=(8,), width=2048, out=2048, gate=(1,), residual=True),
    Int8LinearCase(rows=(1,), width=2048, out=8192),
    *(LinearCase(rows=(rows,), width=520, out=136, activation="gelu") for rows in (1, 16, 17, 65, 300)),
    *(Int8LinearCase(rows=(rows,), width=520, out=136, activation="silu") for rows in (1, 16, 17, 65, 300)),
    Int8LinearCase(rows=(3,), width=63, out=65, bias=False, gate=(65,), residual=True),
    *(LinearCase(layout=layout) for layout in ("slice", "strided", "expanded")),
    LinearCase(rows=(0,)),
]
REPEATED: list[Case] = [
    MaskedCrossAttentionCase(batch=4, length=1024, media=8, latents=64, heads=8, head_dim=64),
    MaskedCrossAttentionCase(length=1000, media=2, latents=64, head_dim=64, immediate=False, times="jumps"),
    PerceiverAttentionCase(clips=1, queries=64, features=7680, latents=64, heads=8, head_dim=64),
    PerceiverAttentionCase(clips=5, features=300, lengths=(0, 7, 63, 300), head_dim=64, groups=2),
    GatedResidualCase(shape=(8192, 2048)),
    GatedResidualCase(shape=(2048, 2048), gate=(2048,)),
    DECODE[0],
    LINEAR[0],
]
# Without a step and a linear layer: the tensors that grow with their rows are small.
LARGE: list[Case] = [
    MaskedCrossAttentionCase(batch=1, length=2048, media=2, latents=64, heads=8, head_dim=64),
    PerceiverAttentionCase(clips=1, queries=64, features=2048, latents=64, heads=8, head_dim=64),
    GatedResidualCase(shape=(500, 2048)),
]


class Time(NamedTuple):
    """Seconds that a step may take, beside what the steps before it leave over, and one of its tasks."""

    step: float
    task: float = math.inf  # what takes longer hangs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to run the steps.

    Attributes:
        steps: which, in this order, and how long each may take.
        seconds: how long everything may take.
        cases: every branch of every operator, for parity.
        first: how many of them make up the first parity, on the reference too, in the first dtype.
        dtypes: of all cases, the most important first.
        repeated: cases for determinism and graphs.
        large: cases of one sequence, to be the end of tensors past 2^31 elements, in the first dtype.
        timed: shapes, the most important first.
        against: the rivals; all if empty.
        seconds_each: how long to time one shape, all contenders together.
        backends: whose kernels are looked at.
    """

    steps: Mapping[str, Time] = field(hash=False)
    seconds: float
    cases: list[Case] = field(default_factory=list)
    first: int = len(check.CASES)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    repeated: list[Case] = field(default_factory=list)
    large: list[Case] = field(default_factory=list)
    timed: tuple[shapes.Case, ...] = ()
    against: tuple[str, ...] = ()
    seconds_each: float = 0.6
    backends: tuple[str, ...] = ("cuda", "triton", "cpu")


def _in_turn(*groups: list[Case]) -> list[Case]:
    """The first of each group, then the second: where time runs out, it does for all alike."""
    return [case for each in itertools.zip_longest(*groups) for case in each if case]


FULL = Plan(
    cases=list(
        dict.fromkeys(
            [*check.CASES, *sanitizer.SMALL, *_in_turn(MASKED, PERCEIVER, ROWS, DECODE, LINEAR)],
        )
    ),
    repeated=REPEATED,
    large=LARGE,
    timed=shapes.GPU_CASES,
    seconds=480,
    # First comes what the first minutes on a GPU must tell.
    steps={
        "rivals": Time(55, 50),
        "build": Time(30),
        "parity": Time(30, 25),
        "floors": Time(15, 12),
        "bench": Time(165, 45),
        "configs": Time(35, 25),
        "kernels": Time(20, 15),
        "launches": Time(10, 8),
        "more parity": Time(55, 30),
        "determinism": Time(15, 14),
        "graphs": Time(15, 14),
        "large": Time(15, 14),
        "sanitizer": Time(20),
    },
)
QUICK = Plan(
    cases=list(check.CASES),
    repeated=[*REPEATED[::2], LINEAR[0]],
    timed=tuple(case for case in shapes.GPU_CASES if case.targets),
    against=("eager", "sdpa", "torch.add", *BACKENDS),
    seconds_each=0.3,
    seconds=168,
    steps={
        "build": Time(60),
        "parity": Time(20, 18),
        "floors": Time(8, 7),
        "bench": Time(45, 20),
        "more parity": Time(15, 14),
        "determinism": Time(10, 9),
        "graphs": Time(10, 9),
    },
)
CONFIGS = Plan(
    timed=shapes.GPU_CASES,
    backends=("triton",),
    seconds=230,
    steps={"build": Time(10), "configs": Time(220, 60)},
)
# On a cpu: every step, of nothing but small calls.
REHEARSAL = Plan(
    cases=sanitizer.EXAMPLES,
    repeated=sanitizer.EXAMPLES,
    timed=shapes.QUICK,
    against=("eager", "sdpa", "torch.add"),
    seconds_each=0.0,
    seconds=480,
    steps=dict.fromkeys(FULL.steps, Time(math.inf)),
)


def tasks(
    proof: str,
    cases: Iterable[Case],
    backends: Mapping[str, Sequence[str]],
    device: str,
    dtypes: tuple[torch.dtype, ...],
) -> list[Task]:
    """A proof of every case in every dtype on the backends of its operator."""
    return [
        Task(proof, replace(case, dtype=dtype, device=device), backend)
        for dtype in dtypes
        for case in cases
        for backend in backends[case.operator]
    ]
