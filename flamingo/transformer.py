"""The pre-norm transformer layer which the vision encoder and the language model share."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.modules import FeedForward


def rotary_angles(length: int, dim_head: int, device: torch.device) -> Tensor:
    """Angle `position * 10000 ** (-2 i / d)` of each position and each pair i: `[T, d / 2]`."""
    frequencies = 10000.0 ** (-torch.arange(0, dim_head, 2, device=device) / dim_head)
    return torch.outer(torch.arange(length, device=device), frequencies)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: turns the pairs `(x[i], x[i + d / 2])` of `[B, H, T, d]` by their angles."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; with `causal`, a token sees itself and those before it."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x `[B, T, D]`; angles `[T, d / 2]` turn q and k; mask bool `[B, 1, T, T]`, True where a token sees
        another, replaces the causal one."""
        q, k, v = rearrange(self.to_qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.to_out(rearrange(out, "b h t d -> b t (h d)"))


class TransformerLayer(nn.Module):
    """`x + attn(LN(x))`, then `x + ff(x)`."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, causal)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, angles: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm(x), angles, mask)
        return x + self.ff(x)
