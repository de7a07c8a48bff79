"""What self-attentions share, whatever a token sees: projections and heads."""

from einops import rearrange
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; a subclass says which token sees which."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """x `[B, T, D]` to q, k and v, each `[B, H, T, d]`."""
        return rearrange(self.to_qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)

    def merge(self, out: Tensor) -> Tensor:
        """`[B, H, T, d]` to `[B, T, D]`."""
        return self.to_out(rearrange(out, "b h t d -> b t (h d)"))
