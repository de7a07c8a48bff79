"""Whisper-Flamingo and mWhisper-Flamingo: the blocks of a decoder that reads audio and video.

Each step of decoding repeats the text before it, without a cache. So the keys and values of video and audio
are kept while the text grows. Every token sees all of both.

The scores, which an attention returns too, are not made, as a block drops them. Blocks that hooks watch, as
for timestamps, those without a video, and traced runs are left to the original's forward.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._anatomy import Alpha, Norm, Part
from .._kept import grows, kept_kv
from .._predicates import autocast_dtype, is_plain, is_recording
from ..layers.fused import Fused, add_gated
from ..mask import MediaMask
from ..ops import masked_cross_attention
from .family import Family
from .known import KNOWN
from .source import Unreadable, code_hash

_HOME = "whisper_flamingo.whisper.model"  # in the repository, where it is not openai's whisper.model


class ResidualAttentionBlock(Fused):
    anatomy = {
        "attn": Part(),
        "attn_ln": Norm("D"),
        "cross_attn": Part(optional=True),
        "cross_attn_ln": Norm("D", optional=True),
        "mlp": Part(),
        "mlp_ln": Norm("D"),
        "gated_x_attn": Part(),
        "gated_x_attn_ln": Norm("D"),
        "attn_gate": Alpha("D"),
        "ff_ln": Norm("D"),
        "ff": Part(),
        "ff_gate": Alpha("D"),
    }

    add_gated_x_attn: int
    attn: Any
    attn_ln: nn.Module
    cross_attn: Any
    cross_attn_ln: nn.Module
    mlp: nn.Module
    mlp_ln: nn.Module
    gated_x_attn: Any
    gated_x_attn_ln: nn.Module
    attn_gate: nn.Parameter  # [1]
    ff_ln: nn.Module
    ff: nn.Module
    ff_gate: nn.Parameter  # [1]

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        xa: Tensor | None = None,  # [B, S, D], the audio, or [1, S, D] for all texts
        mask: Tensor | None = None,  # of the text
        kv_cache: dict[nn.Module, Tensor] | None = None,
        xv: Tensor | None = None,  # the video, like the audio
    ) -> Tensor:  # [B, T, D]
        stays = not self.add_gated_x_attn or is_recording(x) or self.is_watched()
        if stays or xv is None or not _are_for(xv, x):
            return cast(Tensor, super().forward(x, xa, mask, kv_cache, xv))
        follows = grows(self, x.shape[1])
        y = _attend(self.gated_x_attn, self.gated_x_attn_ln(x), xv, None, follows=follows)
        x = add_gated(x, y, self.attn_gate)
        x = add_gated(x, self.ff(self.ff_ln(x)), self.ff_gate)
        x = x + self.attn(self.attn_ln(x), mask=mask, kv_cache=kv_cache)[0]
        if self.cross_attn is not None:
            x = x + _attend(self.cross_attn, self.cross_attn_ln(x), xa, kv_cache, follows=follows)
        return x + self.mlp(self.mlp_ln(x))


def _attend(
    attn: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | None,  # [B, S, D], or [1, S, D]
    cache: dict[nn.Module, Tensor] | None,
    *,
    follows: bool,
) -> Tensor:  # [B, T, D]
    """The output of an attention; `follows` says that the text continues the one before."""
    if media is None or not _takes(attn, x, media) or (cache and attn.key in cache):
        return cast(Tensor, attn(x, media, kv_cache=cache)[0])
    heads = (attn.n_head, -1)

    def project() -> tuple[Tensor, Tensor]:  # [B, S, H, d] each
        return attn.key(media).unflatten(-1, heads), attn.value(media).unflatten(-1, heads)

    k, v = kept_kv(attn, media, (attn.key, attn.value), project, step=follows, also=_is_linear)
    q = attn.query(x).unflatten(-1, heads)  # [B, T, H, d]
    if len(media) == 1:
        q = q.flatten(0, 1)[None]
    seen = torch.ones(q.shape[:2], dtype=torch.int64, device=q.device)
    out = masked_cross_attention(
        q, k[:, None], v[:, None], MediaMask.from_text_time(seen, 1), scale=q.shape[-1] ** -0.5
    )
    return cast(Tensor, attn.out(out.reshape(*x.shape[:2], -1)))


def _takes(attn: nn.Module, x: Tensor, media: Tensor) -> bool:
    """Whether an attention is Whisper's own, and what it would get fits."""
    alike = media.dtype == x.dtype or autocast_dtype(x.device) is not None
    return alike and _are_for(media, x) and _is_known(attn, "MultiHeadAttention")


def _are_for(media: Tensor, x: Tensor) -> bool:
    """Whether there are media for each text, or for all."""
    fits = x.ndim == media.ndim == 3 and media.shape[0] in (1, x.shape[0])
    return fits and x.numel() > 0 and media.numel() > 0


def _is_linear(module: nn.Module) -> bool:
    return _is_known(module, "Linear")


def _is_known(module: nn.Module, name: str) -> bool:
    """Whether calling a module runs the known forward of the class of this name in Whisper, and no other."""
    cls: Any = type(module)
    return is_plain(module, cls) and _has_known_code(cls, name)


@functools.cache
def _has_known_code(cls: Any, name: str) -> bool:
    try:
        return code_hash(cls, origin=_HOME) in KNOWN[f"{_HOME}.{name}"]
    except Unreadable:
        return False


FAMILY = Family("Whisper-Flamingo", _HOME, (ResidualAttentionBlock,), "whisper-flamingo main")
