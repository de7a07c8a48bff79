"""Where tokens stand, and how a decoder tells: rotary and relative positions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where T new tokens stand among the K of their text; every layer gets the same."""

    visible: Tensor | None  # bool [B or 1, 1, T, K]: token sees token; None for all before it, T = K
    angles: Tensor | None = None  # [B or 1, 1, T, d / 2], of rotary positions
    distance: Tensor | None = None  # int64 [B or 1, 1, T, K], of relative positions
    longer: Tensor | None = None  # [T, D], the distances K - T to K - 1 as sinusoids, with relative ones


def positions_of(attention_mask: Tensor) -> Tensor:
    """The number of tokens before each, without padding: `[B, K]`, 0 where nothing was before."""
    return (attention_mask != 0).cumsum(dim=1).sub(1).clamp(min=0)


def rotary_angles(positions: Tensor, dim_head: int) -> Tensor:
    """Angle `position * 10000 ** (-2 i / d)` of positions `[...]` and each pair i: `[..., d / 2]`."""
    frequencies = 10000.0 ** (-torch.arange(0, dim_head, 2, device=positions.device) / dim_head)
    return positions[..., None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: turns the pairs `(x[i], x[i + d / 2])` of `[B, H, T, d]` by their angles."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """`[n]` positions as `[n, dim]`: sines, then cosines, of dim / 2 wavelengths from 2 pi to 20000 pi."""
    angles = rotary_angles(positions, dim)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
