"""What is compiled, and for which GPUs."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch

from flamingo_kernels._backends.triton import config
from flamingo_kernels._backends.triton.config import Device
from flamingo_kernels.testing import (
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Int8LinearCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
)

KIB = 1024


def modules_that_ask() -> list[ModuleType]:
    """Those that choose launches by what device there is: whoever pretends another one must tell them all."""
    modules = list(sys.modules.values())
    return [module for module in modules if getattr(module, "device_of", None) is config.device_of]


class Target(NamedTuple):
    """A GPU: what Triton calls it, and what a program may take of it."""

    backend: str
    architecture: int | str
    warp_size: int
    device: Device
    shared_memory: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target("cuda", 80, 32, Device("sm_80", 108), 163 * KIB),
    "sm_89": Target("cuda", 89, 32, Device("sm_89", 128), 99 * KIB),
    "sm_90": Target("cuda", 90, 32, Device("sm_90", 132), 227 * KIB),
    "sm_100": Target("cuda", 100, 32, Device("sm_100", 148), 227 * KIB),
    "gfx942": Target("hip", "gfx942", 64, Device("gfx942", 304), 64 * KIB),
}

BF16 = {"dtype": torch.bfloat16}
MASKED = MaskedCrossAttentionCase(batch=8, length=1024, media=8, latents=64, heads=8, head_dim=64, **BF16)
PERCEIVER = PerceiverAttentionCase(
    clips=160, queries=64, features=256, latents=64, heads=8, head_dim=64, **BF16
)
RESIDUAL = GatedResidualCase(shape=(4096, 2048), **BF16)
LINEAR = LinearCase(rows=(8,), width=2048, out=2048, **BF16)
INT8 = Int8LinearCase(rows=(8,), width=2048, out=2048, **BF16)
DECODE = GatedBlockDecodeCase(
    batch=8, dim=1024, hidden=4096, media=5, latents=64, heads=8, head_dim=64, **BF16
)

# "usual": what the models people run launch, for every target. "rest": every other branch, dtype and size.
CASES: dict[str, list[Case]] = {
    "usual": [
        MASKED,
        replace(MASKED, immediate=False, policy="open_flamingo"),
        replace(MASKED, batch=1, length=1, times="cached"),
        PERCEIVER,
        replace(PERCEIVER, heads=16, head_dim=96),
        RESIDUAL,
        LINEAR,
        replace(INT8, activation="gelu", residual=True, gate=(1,)),
        DECODE,
        replace(DECODE, glu=True, rms=True, q_norm=True, groups=4, heads=16, head_dim=128, activation="silu"),
        replace(DECODE, integers=True, x_dtype=torch.float32),
    ],
    "rest": [
        *(replace(MASKED, head_dim=d) for d in (80, 96, 128, 256)),
        *(replace(MASKED, head_dim=d, immediate=False) for d in (80, 128, 256)),
        replace(MASKED, dtype=torch.float16, policy="open_flamingo", groups=4),
        *(replace(MASKED, latents=r) for r in (128, 256)),
        *(replace(MASKED, head_dim=d, dtype=torch.float32) for d in (64, 128, 256)),
        replace(MASKED, immediate=False, dtype=torch.float32),
        replace(PERCEIVER, clips=8, features=7680, lengths=(7680, 100)),
        *(replace(PERCEIVER, head_dim=d) for d in (80, 128, 256)),
        replace(PERCEIVER, heads=16, groups=4, head_dim=96),
        replace(PERCEIVER, dtype=torch.float16, queries=200),
        *(replace(PERCEIVER, head_dim=d, dtype=torch.float32) for d in (64, 128)),
        replace(RESIDUAL, gate=(2048,), dtype=torch.float32),
        replace(RESIDUAL, shape=(4096, 63), dtype=torch.float16),
        *(replace(kind, rows=(rows,)) for rows in (33, 512) for kind in (LINEAR, INT8)),
        *(replace(LINEAR, rows=(rows,), dtype=torch.float32) for rows in (8, 33)),
        *(replace(INT8, rows=(rows,), dtype=torch.float32) for rows in (8, 33)),
        *(replace(LINEAR, activation=each, bias=False) for each in ("gelu_tanh", "relu", "squared_relu")),
        *(replace(DECODE, head_dim=d, immediate=False, latents=1601) for d in (80, 96, 128, 256)),
        replace(DECODE, dtype=torch.float16, batch=64, texts=4, groups=8, bias=True, gate=(1024,)),
        *(replace(DECODE, dtype=torch.float32, head_dim=d, q_norm=True, glu=True) for d in (64, 128, 256)),
    ],
}
