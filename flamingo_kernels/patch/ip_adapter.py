"""The resampler of IP-Adapter Plus, and of the projects that have copied it.

It is open_flamingo's for one medium, between two projections. Queries and keys are each multiplied by the
fourth root of 1 / d, for the range of float16, so the scale of the softmax is the square root; what the
attention calls `scale` is not read.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._anatomy import Linear, Norm, Number, Part, Weight
from ..layers.fused import Fused, is_fused
from ..layers.resampler import LatentAttention, perceive, resample
from ..media_cache import Source
from .family import Family


class PerceiverAttention(LatentAttention):
    anatomy = {
        "heads": Number("H"),
        "dim_head": Number("d"),
        "norm1": Norm("D"),
        "norm2": Norm("D"),
        "to_q": Linear("D", "H*d"),
        "to_kv": Linear("D", "2*H*d"),
        "to_out": Linear("H*d", "D"),
    }

    dim_head: int
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm

    @property
    def norms(self) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        return self.norm1, self.norm2

    @property
    def softmax_scale(self) -> float:
        return cast(float, self.dim_head**-0.5)

    def forward(
        self,
        x: Tensor,  # [N, S, D]
        latents: Tensor,  # [N, R, D]
    ) -> Tensor:  # [N, R, D]
        if self.is_watched():
            return cast(Tensor, super().forward(x, latents))
        k, v = Source(self.to_kv, self.heads, self.norm1).project(x[:, None])
        return perceive(self, latents[:, None], k, v)[:, 0]


class Resampler(Fused):
    anatomy = {
        "pos_emb": Part(optional=True),
        "latents": Weight("1 R D"),
        "proj_in": Linear("E", "D"),
        "proj_out": Linear("D", "O"),
        "norm_out": Norm("O"),
        "to_latents_from_mean_pooled_seq": Part(optional=True),
        "layers": Part(nn.ModuleList),
    }

    latents: nn.Parameter
    proj_in: nn.Module
    proj_out: nn.Module
    norm_out: nn.Module
    layers: nn.ModuleList

    def forward(
        self,
        x: Tensor,  # [N, S, E]
    ) -> Tensor:  # [N, R, O]
        if self.is_watched() or not self._has_fused_layers():
            return cast(Tensor, super().forward(x))
        positions = getattr(self, "pos_emb", None)  # not in the first releases
        if positions is not None:
            x = x + positions(torch.arange(x.shape[1], device=x.device))
        x = self.proj_in(x)
        latents = resample(self._first_latents(x)[:, None], self.layers, x[:, None], None)
        return cast(Tensor, self.norm_out(self.proj_out(latents[:, 0])))

    def _has_fused_layers(self) -> bool:
        attns = [layer[0] for layer in cast(Any, self.layers)]
        return bool(attns) and all(isinstance(attn, PerceiverAttention) and is_fused(attn) for attn in attns)

    def _first_latents(self, x: Tensor) -> Tensor:  # [1, R, D] for all, or [N, ., D] with some of their mean
        of_mean = getattr(self, "to_latents_from_mean_pooled_seq", None)
        if not of_mean:
            return self.latents
        count = torch.ones(x.shape[:2], device=x.device).sum(1, keepdim=True).clamp(min=1e-5)
        return torch.cat((of_mean(x.sum(1) / count), self.latents.expand(len(x), -1, -1)), dim=1)


FAMILY = Family(
    "IP-Adapter",
    "ip_adapter.resampler",
    (PerceiverAttention, Resampler),
    "IP-Adapter 2023.8.23 to 2024.6.28",
)
