"""Swap a class of your own that computes what a known one does: `patch(model, like=...)`.

    python examples/swap_your_own_copy.py

Takes a few seconds. `patch` knows classes by their code, so it does not know one that you have rewritten.
`like` says what the class is, and a trial of a small instance decides by outputs and gradients whether
that is true. Parts must have the same names (here `norm_media`, `norm_latents`, `to_q`, `to_kv`,
`to_out`).

It prints the report with the trial, how far outputs and gradients are from those before, and the error
for a class that computes something else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_kernels import UnsupportedError, patch

KNOWN = "open_flamingo.PerceiverAttention"
DIM, LAYERS, IMAGES, FEATURES, LATENTS = 256, 2, 3, 196, 64


class Reads(nn.Module):
    """A resampler's attention, written by hand: latents read the features of an image, and themselves."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:  # [B, M, S, D] and [B, M, R, D]
        latents = self.norm_latents(latents)
        q = self.to_q(latents).unflatten(-1, (self.heads, -1))
        k, v = (
            self.to_kv(self.read(self.norm_media(x), latents)).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        )
        q, k, v = (each.transpose(-3, -2) for each in (q, k, v))  # [B, M, H, ..., d]
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(out.transpose(-3, -2).flatten(-2))

    def read(self, x: Tensor, latents: Tensor) -> Tensor:
        return torch.cat((x, latents), dim=-2)


class ReadsImagesAlone(Reads):
    """Has the same parts, but its latents do not read themselves."""

    def read(self, x: Tensor, latents: Tensor) -> Tensor:
        return x


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, IMAGES, FEATURES, DIM), torch.randn(1, IMAGES, LATENTS, DIM)


def results(layers: nn.ModuleList) -> list[Tensor]:
    """What the layers add to the latents, and the gradient of every parameter."""
    x, start = inputs()
    latents = start
    for layer in layers:
        latents = latents + layer(x, latents)
    gradients = torch.autograd.grad(latents.square().mean(), list(layers.parameters()))
    return [(latents - start).detach(), *gradients]


def main() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(Reads(dim=DIM) for _ in range(LAYERS))
    before = results(model)

    print(patch(model, like={Reads: KNOWN}))  # or by its name: like={"Reads": ...}
    after = results(model)
    apart = [float((new - old).norm() / old.norm()) for new, old in zip(after, before, strict=True)]
    print(f"output: {apart[0]:.1e} apart, gradients: at most {max(apart[1:]):.1e}")

    other = ReadsImagesAlone(dim=DIM)
    try:
        patch(other, like={ReadsImagesAlone: KNOWN})
    except UnsupportedError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
