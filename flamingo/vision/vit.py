"""A small vision transformer: an image to a grid of features."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.modules import FeedForward
from flamingo.self_attention import SelfAttention
from flamingo.vision.frames import as_images, expect_frames


class FullSelfAttention(SelfAttention):
    """Every patch sees every other."""

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`."""
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class TransformerLayer(nn.Module):
    """`x + attn(LN(x))`, then `x + ff(x)`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = FullSelfAttention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ff(x)


class VisionEncoder(nn.Module):
    """Cuts a frame into patches and returns one feature a patch.

    Args:
        image_size, patch_size: pixels of one side.
        dim: width of the features.
        layers, heads: of the transformer.

    Attributes:
        settings: what decides the features beside the weights.

    >>> encoder = VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2)
    >>> encoder(torch.zeros(2, 3, 1, 3, 16, 16)).shape
    torch.Size([2, 3, 1, 4, 12])
    """

    def __init__(self, *, image_size: int, patch_size: int, dim: int, layers: int, heads: int):
        super().__init__()
        self.image_size = image_size
        self.dim = dim
        self.settings = {"heads": heads}
        self.to_patches = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2, dim) * 0.02)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels `[B, M, F, 3, image_size, image_size]` to features `[B, M, F, v, dim]`.

        Raises:
            ValueError: if pixels has another shape.
            TypeError: pixels are integers.
        """
        expect_frames(self, pixels, self.image_size)
        patches = self.to_patches(
            as_images(self, pixels, self.positions.dtype)
        )  # [B * M * F, dim, rows, columns]
        x = rearrange(patches, "n d rows columns -> n (rows columns) d") + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).unflatten(0, pixels.shape[:3])
