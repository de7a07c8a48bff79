"""The activations of a hidden layer in Triton, of float32 numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION` is a place in `ACTIVATIONS`. NaN stays NaN."""
    if ACTIVATION == 1:
        x *= share_below(x)
    elif ACTIVATION == 2:
        x *= sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2
    elif ACTIVATION == 3:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 4:
        x = tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == 5:
        x *= sigmoid(x)
    return x


@triton.jit
def sigmoid(x):
    t = tl.exp(-tl.abs(x))  # at most 1
    return tl.where(x < 0, t, 1.0) / (1 + t)


@triton.jit
def share_below(x):
    """The share of a normal distribution below x, to 1e-7: `(1 + erf(x / sqrt(2))) / 2`. Abramowitz and
    Stegun, 7.1.26, gives the smaller of the two shares, from which nothing is subtracted.
    """
    t = 1 / (1 + 0.231641888 * tl.abs(x))
    p = 0.530702715 * t - 0.726576013
    p = p * t + 0.710706871
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    smaller = p * t * tl.exp(-0.5 * x * x)
    return tl.where(x < 0, smaller, 1 - smaller)
