"""Peak memory of masked cross-attention: beside inputs, output and gradients, nothing grows with T * M."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

# Both shapes have as many elements in q, out, dq (T * d) and in k, v, dk, dv (M * d), and the same R and H.
# From the first to the second, T * M grows 16 times.
SHAPES = [{"length": 512, "media": 8, "head_dim": 128}, {"length": 2048, "media": 32, "head_dim": 32}]
LATENTS, HEADS = 32, 8
# What one head's scores of the second shape would take, in bytes.
SCORES = 2048 * 32 * LATENTS * 4

MEASURE = f"""
import json, sys
import torch
from flamingo_kernels import MediaMask, masked_cross_attention

torch.set_num_threads(1)
backend, immediate = sys.argv[1], sys.argv[2] == "True"

def peak():
    '''The most memory this process has held since the last reset, in bytes.'''
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def extra(length, media, head_dim):
    q = torch.randn(1, length, {HEADS}, head_dim, requires_grad=True)
    k, v = (torch.randn(1, media, {LATENTS}, {HEADS}, head_dim, requires_grad=True) for _ in range(2))
    dout = torch.randn_like(q)
    times = torch.arange(length)[None] * media // length + 1
    mask = MediaMask.from_text_time(times, media, immediate=immediate)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    out = masked_cross_attention(q, k, v, mask, backend=backend)
    torch.autograd.grad(out, (q, k, v), dout)
    return peak() - before

shapes = json.loads(sys.argv[3])
extra(**dict(shapes[0], length=8))  # what the first call sets up
print([extra(**shape) for shape in shapes])
"""


def growth(backend: str, immediate: bool) -> int:
    """Bytes by which the peak of the second shape exceeds that of the first."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs, which resets the peak, is not writable here")
    # freed blocks go back to the system at once, so that the resident size is what is in use
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, str(immediate), json.dumps(SHAPES)],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    print(f"{backend}: {small >> 20}, then {large >> 20} MiB; the scores of one head: {SCORES >> 20} MiB")
    return large - small


@pytest.mark.parametrize("immediate", [True, False])
def test_the_kernel_keeps_no_scores(immediate, compiled):
    """Not even those of a single one of the heads."""
    assert growth(compiled, immediate) < SCORES


def test_the_measurement_sees_scores():
    """The reference keeps every head's, so the same bound refuses it."""
    assert growth("reference", True) > HEADS * SCORES
