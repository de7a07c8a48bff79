"""Time an operator at your own shape against your own function.

    python examples/benchmark_your_own.py [--shape "B1 T512 M4 H8 d64 R64"] [--seconds 2]

Takes about half a minute on two cores. It is `python -m flamingo_kernels bench` with rivals from this file:

    python -m flamingo_kernels bench --op masked_cross_attention --shape "B1 T512 M4 H8 d64 R64" \
        --rival examples/benchmark_your_own.py:dense --rival examples/benchmark_your_own.py:unmasked

Every contender is compared with float64 before it is timed. So `dense` gets a row; `unmasked`, which
ignores the mask, gets a reason instead. It prints the table, and how many times as long as ours the rival
took.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels import MediaMask
from flamingo_kernels.__main__ import main as flamingo_kernels
from flamingo_kernels.commands.bench.rows import Run

SHAPE = "B1 T512 M4 H8 d64 R64"


@cache  # a mask is the same object in every call: what is made of it may be kept
def written_out(mask: MediaMask, latents: int) -> Tensor:
    return mask.dense(latents)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> Tensor:
    """PyTorch's attention with the mask written out. It is called as `masked_cross_attention` is."""
    visible = written_out(mask, k.shape[2])
    q, k, v = (each.transpose(1, 2) for each in (q, k.flatten(1, 2), v.flatten(1, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: MediaMask) -> Tensor:
    """A mistake: every token sees every image."""
    q, k, v = (each.transpose(1, 2) for each in (q, k.flatten(1, 2), v.flatten(1, 2)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def main(shape: str = SHAPE, seconds: float = 2.0) -> None:
    rivals = [f"{__file__}:{rival.__name__}" for rival in (dense, unmasked)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "bench.json")
        command = ["bench", "--op", "masked_cross_attention", "--shape", shape, "--dtype", "float32"]
        command += ["--rival", rivals[0], "--rival", rivals[1], "--against", "eager"]
        command += ["--seconds", str(seconds), "--json", str(file)]
        if status := flamingo_kernels(command):  # it prints the table
            sys.exit(status)
        found = Run.load(file)

    print()
    for row in found.rows:
        if row.contender == rivals[0]:
            print(f"dense, {row.mode}: {row.ratio:.2f} times as long as ours")
    for each in found.skipped:
        if each.refused:
            print(f"{each.contender.rpartition(':')[2]}, {each.mode}: refused, {each.reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    main(options.shape, options.seconds)
