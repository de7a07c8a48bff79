"""Modules with the parts of Audio Flamingo's and Whisper-Flamingo's, in our own words.

Each computes what its original does, but that norms and softmax are in float64 if the input is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_kernels.patch import audio_flamingo, audio_flamingo_inference, whisper_flamingo
from flamingo_kernels.patch.known import KNOWN
from flamingo_kernels.patch.source import code_hash
from tests.helpers.lookalikes import feed_forward, merge, split


class Hears(nn.Module):
    """A MaskedCrossAttention of Audio Flamingo 1: each row hears the audios so far."""

    def __init__(
        self,
        *,
        dim,
        dim_audio,
        max_window_per_audio,
        dim_head=64,
        heads=8,
        only_attend_immediate_media=True,
    ):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.max_window_per_audio = max_window_per_audio
        self.only_attend_immediate_media = only_attend_immediate_media
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_audio, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, media, media_mask, media_locations=None, use_cached_media=False):
        assert use_cached_media or media_locations.shape[1] == x.shape[1]
        assert media.shape[2] == 1
        assert media.shape[1] % self.max_window_per_audio == 0
        assert self.only_attend_immediate_media is False
        q = split(self.to_q(self.norm(x)), self.heads)
        k, v = (split(each, self.heads) for each in self.to_kv(media[:, :, 0]).chunk(2, -1))
        scores = self.scale * q @ k.transpose(-1, -2)  # [B, H, T, L]
        heard = media_mask.bool().flatten(1)[:, None]  # [B, 1, L]
        if media_locations is not None:
            heard = heard & self.windows(media_locations, x.shape[1], media.shape[1])
        scores = scores.masked_fill(~heard[:, None], -torch.finfo(scores.dtype).max)
        return self.to_out(merge(scores.softmax(-1) @ v))

    def windows(self, places, length, keys):
        """`[B, T, L]`, the windows of the audios so far; of the first for what comes before it."""
        ends = [
            [self.end(row.nonzero().flatten().tolist(), token) for token in range(length)] for row in places
        ]
        return torch.arange(keys) < torch.tensor(ends)[..., None]

    def end(self, starts, token):
        before_first = token < starts[0]
        return self.max_window_per_audio * (before_first or sum(start <= token for start in starts))


class HearsAll(Hears):
    """The one of Audio Flamingo 2 for inference: every row hears every audio."""

    def windows(self, places, length, keys):
        return torch.ones(len(places), length, keys, dtype=torch.bool)


class HearsGated(nn.Module):
    """A GatedCrossAttentionBlock of both."""

    def __init__(self, *, dim, hears=Hears, ff_mult=4, **sizes):
        super().__init__()
        self.attn = hears(dim=dim, **sizes)
        self.ff = feed_forward(dim, ff_mult)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x, media, media_mask, media_locations=None, use_cached_media=False):
        heard = self.attn(x, media, media_mask, media_locations, use_cached_media)
        x = x + self.attn_gate.tanh() * heard
        return x + self.ff_gate.tanh() * self.ff(x)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


class CastsNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.to(wide(x.dtype))).to(x.dtype)


class CastsLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Listens(nn.Module):
    """A MultiHeadAttention of Whisper."""

    def __init__(self, width, heads):
        super().__init__()
        self.n_head = heads
        self.query, self.value, self.out = (CastsLinear(width, width) for _ in range(3))
        self.key = CastsLinear(width, width, bias=False)

    def forward(self, x, xa=None, mask=None, kv_cache=None):
        media = x if xa is None else xa
        kept = xa is not None and kv_cache is not None and self.key in kv_cache
        k, v = (kv_cache[each] if kept else each(media) for each in (self.key, self.value))
        q, k, v = (split(each, self.n_head) for each in (self.query(x), k, v))
        factor = q.shape[-1] ** -0.25
        scores = (q * factor) @ (k * factor).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[: x.shape[1], : x.shape[1]]
        scores = scores.to(wide(scores.dtype))
        return self.out(merge(scores.softmax(-1).to(q.dtype) @ v)), scores.detach()


class Watches(nn.Module):
    """A ResidualAttentionBlock of Whisper-Flamingo."""

    def __init__(self, width, heads, cross_attention=False, add_gated_x_attn=0):
        super().__init__()
        self.attn, self.attn_ln = Listens(width, heads), CastsNorm(width)
        self.cross_attn = Listens(width, heads) if cross_attention else None
        self.cross_attn_ln = CastsNorm(width) if cross_attention else None
        self.mlp, self.mlp_ln = self.network(width), CastsNorm(width)
        self.add_gated_x_attn = add_gated_x_attn
        if add_gated_x_attn:
            self.gated_x_attn, self.gated_x_attn_ln = Listens(width, heads), CastsNorm(width)
            self.ff, self.ff_ln = self.network(width), CastsNorm(width)
            self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def network(self, width):
        return nn.Sequential(CastsLinear(width, 4 * width), nn.GELU(), CastsLinear(4 * width, width))

    def forward(self, x, xa=None, mask=None, kv_cache=None, xv=None):
        if self.add_gated_x_attn:
            x = x + self.attn_gate.tanh() * self.gated_x_attn(self.gated_x_attn_ln(x), xv)[0]
            x = x + self.ff_gate.tanh() * self.ff(self.ff_ln(x))
        x = x + self.attn(self.attn_ln(x), mask=mask, kv_cache=kv_cache)[0]
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), xa, kv_cache=kv_cache)[0]
        return x + self.mlp(self.mlp_ln(x))


_AUDIO, _INFERENCE, _WHISPER = (
    home.FAMILY.module for home in (audio_flamingo, audio_flamingo_inference, whisper_flamingo)
)
NAMES = {
    Hears: f"{_AUDIO}.MaskedCrossAttention",
    HearsAll: f"{_INFERENCE}.MaskedCrossAttention",
    HearsGated: f"{_AUDIO}.GatedCrossAttentionBlock",
    Watches: f"{_WHISPER}.ResidualAttentionBlock",
    Listens: f"{_WHISPER}.MultiHeadAttention",
    CastsLinear: f"{_WHISPER}.Linear",
}


def make_known(monkeypatch):
    """Have the code of these classes known as that of the originals, until a test ends."""
    for cls, name in NAMES.items():
        code = code_hash(cls, origin=name.rpartition(".")[0])
        monkeypatch.setitem(KNOWN, name, {**KNOWN[name], code: "a lookalike"})
