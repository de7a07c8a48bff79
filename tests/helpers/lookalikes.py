"""Modules with the parts of open_flamingo's, in our own words: what a copy by another author may look like.

Each computes what its original does. Traps derive from them and replace one step.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.weights import randomise

SIZES = {"dim": 16, "dim_head": 16, "heads": 2}
VISUAL = 12


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [..., H, T, d]


def merge(x):
    return x.transpose(-3, -2).flatten(-2)


class LooksAtMedia(nn.Module):
    """A MaskedCrossAttention."""

    def __init__(self, *, dim, dim_visual, dim_head=64, heads=8, only_attend_immediate_media=True):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        return self.result(x, media, media_locations, use_cached_media)

    def result(self, x, media, places, follows):
        scores = self.scores(self.queries(x), self.keys(media))
        if places is None:
            return self.read(scores.softmax(-1), media)
        times = self.times(x, places, follows)
        scores = scores.masked_fill(~self.visible(times, media)[:, None], self.hidden(scores))
        p = scores.softmax(-1)
        if self.only_attend_immediate_media:
            p = p.masked_fill((times == 0)[:, None, :, None], 0)
        return self.read(p, media)

    def queries(self, x):
        return split(self.to_q(self.norm(x)), self.heads)

    def keys(self, media):
        return split(self.to_kv(media).chunk(2, -1)[0].flatten(1, 2), self.heads)

    def values(self, media):
        return split(self.to_kv(media).chunk(2, -1)[1].flatten(1, 2), self.heads)

    def scores(self, q, k):
        return self.scale * q @ k.transpose(-1, -2)

    def times(self, x, places, follows):
        """`[B, T]`, the number of the last image of every token."""
        if follows:
            return places.count_nonzero(1)[:, None].expand(-1, x.shape[1])
        return places.cumsum(1)

    def visible(self, times, media):
        """`[B, T, M * R]`, whether a token sees a latent."""
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        same = times[..., None] == number
        return same if self.only_attend_immediate_media else times[..., None] >= number

    def hidden(self, scores):
        return -torch.finfo(scores.dtype).max

    def read(self, p, media):
        return self.to_out(merge(p @ self.values(media)))


def feed_forward(dim, mult):
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class Gated(nn.Module):
    """A GatedCrossAttentionBlock."""

    attention = LooksAtMedia

    def __init__(self, *, dim, dim_visual, ff_mult=4, **sizes):
        super().__init__()
        self.attn = self.attention(dim=dim, dim_visual=dim_visual, **sizes)
        self.ff = feed_forward(dim, ff_mult)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        x = self.add_media(x, media, media_locations, use_cached_media)
        return self.add_feed_forward(x)

    def add_media(self, x, *media):
        return x + self.attn_gate.tanh() * self.attn(x, *media)

    def add_feed_forward(self, x):
        return x + self.ff_gate.tanh() * self.ff(x)


class LooksAhead(LooksAtMedia):
    """A MaskedCrossAttention of the first release: it counts the images of the call alone."""

    def forward(self, x, media, media_locations=None, attend_previous=True):
        return self.result(x, media, media_locations, attend_previous)

    def times(self, x, places, attend_previous):
        times = places.cumsum(1)
        if attend_previous:
            return times
        ahead = times + ~places
        return ahead.where(ahead <= places.count_nonzero(1)[:, None], 0)


class GatedAhead(Gated):
    """A GatedCrossAttentionBlock of the first release."""

    attention = LooksAhead

    def forward(self, x, media, media_locations=None, attend_previous=True):
        return self.add_feed_forward(self.add_media(x, media, media_locations, attend_previous))


class ListedAhead(GatedAhead):
    """A gated block of Otter."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.feed_forward = nn.ModuleList(self.ff)
        del self.ff

    def add_feed_forward(self, x):
        y = x
        for module in self.feed_forward:
            y = module(y)
        return x + self.ff_gate.tanh() * y


class LooksFromTheEnd(LooksAtMedia):
    """A MaskedCrossAttention of the branches: the text is the end of its locations."""

    def forward(self, x, media, media_locations=None):
        if media_locations.shape[1] < x.shape[1]:
            raise AssertionError("the text is longer than its locations")
        return self.result(x, media, media_locations, False)

    def times(self, x, places, follows):
        return super().times(x, places, follows)[:, -x.shape[1] :]


class LooksAndGives(LooksAtMedia):
    """A MaskedCrossAttention of flamingo-mini: it gives its keys and values back, and takes them again."""

    def __init__(self, *, n_visual=4, **sizes):
        super().__init__(**sizes)
        self.n_visual = n_visual
        del self.only_attend_immediate_media

    def forward(self, y, media_locations, visual_features, previous_kv=None, output_kv=False):
        kv = previous_kv or (self.keys(visual_features), self.values(visual_features))
        times = media_locations.cumsum(1)
        if previous_kv is not None:
            times = times[:, -y.shape[1] :]
        media = visual_features.shape[1] if previous_kv is None else kv[0].shape[2] // self.n_visual
        image = torch.arange(1, media + 1).repeat_interleave(self.n_visual)
        scores = self.scores(self.queries(y), kv[0])
        scores = scores.masked_fill((times[..., None] != image)[:, None], self.hidden(scores))
        p = scores.softmax(-1).masked_fill((times == 0)[:, None, :, None], 0)
        return self.to_out(merge(p @ kv[1])), kv if output_kv else None


class GatedAndGives(nn.Module):
    """A gated block of flamingo-mini."""

    def __init__(self, *, dim, dim_visual, ff_mult=4, **sizes):
        super().__init__()
        self.attn = LooksAndGives(dim=dim, dim_visual=dim_visual, **sizes)
        self.ffw = feed_forward(dim, ff_mult)
        self.alpha_attn, self.alpha_ffw = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, y, visual_features, media_locations, previous_kv=None, output_kv=False):
        attended, kv = self.attn(y, media_locations, visual_features, previous_kv, output_kv)
        y = y + self.alpha_attn.tanh() * attended
        return y + self.alpha_ffw.tanh() * self.ffw(y), kv


class Reads(nn.Module):
    """A PerceiverAttention."""

    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, latents):
        return self.result(self.norm_media(x), self.norm_latents(latents))

    def result(self, x, latents):
        k, v = (split(each, self.heads) for each in self.to_kv(self.seen(x, latents)).chunk(2, -1))
        q = split(self.to_q(latents), self.heads)
        return self.to_out(merge(self.weights(self.scores(q, k)) @ v))

    def seen(self, x, latents):
        return torch.cat((x, latents), -2)

    def scores(self, q, k):
        return self.scale * q @ k.transpose(-1, -2)

    def weights(self, scores):
        return scores.softmax(-1)


class Sums(nn.Module):
    """A PerceiverResampler."""

    attention = Reads

    def __init__(
        self,
        *,
        dim,
        depth=6,
        num_latents=64,
        max_num_media=None,
        max_num_frames=None,
        ff_mult=4,
        dim_head=64,
        heads=8,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = max_num_frames and nn.Parameter(torch.randn(max_num_frames, dim))
        self.media_time_embs = max_num_media and nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [self.attention(dim=dim, dim_head=dim_head, heads=heads), self.network(dim, ff_mult)]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def network(self, dim, mult):
        return feed_forward(dim, mult) if mult else nn.Identity()

    def forward(self, x):
        x = self.positioned(x)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for number, (attn, ff) in enumerate(self.layers):
            latents = self.step(number, attn, ff, x, latents)
        return self.last(latents)

    def positioned(self, x):
        if self.frame_embs is not None:
            x = x + self.frame_embs[: x.shape[2], None]
        x = x.flatten(2, 3)
        return x if self.media_time_embs is None else x + self.media_time_embs[: x.shape[1]]

    def step(self, number, attn, ff, x, latents):
        latents = latents + attn(x, latents)
        return latents + ff(latents)

    def last(self, latents):
        return self.norm(latents)


class SumsProjected(Sums):
    """A resampler of the branches."""

    def __init__(self, *, dim, dim_inner=None, **sizes):
        super().__init__(dim=dim_inner or dim, **sizes)
        self.projection = dim_inner and nn.Linear(dim, dim_inner)

    def positioned(self, x):
        return super().positioned(x if self.projection is None else self.projection(x))


class ReadsSome(Reads):
    """An attention of xGen-MM's resampler."""

    def forward(self, x, latents, vision_attn_masks=None):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = (split(each, self.heads) for each in self.to_kv(self.seen(x, latents)).chunk(2, -1))
        scores = self.scores(split(self.to_q(latents), self.heads), k)
        if vision_attn_masks is not None:
            own = torch.ones(len(x), latents.shape[-2], dtype=vision_attn_masks.dtype)
            seen = torch.cat((vision_attn_masks, own), -1) != 0
            scores = scores.masked_fill(~seen[:, None, None, None], -torch.inf)
        return self.to_out(merge(scores.softmax(-1) @ v))


class SumsSome(Sums):
    """xGen-MM's resampler."""

    attention = ReadsSome

    def __init__(self, *, dim, dim_inner=None, **sizes):
        super().__init__(dim=dim, **sizes)
        self.projection = dim_inner and nn.Linear(dim, dim_inner)

    def forward(self, x, vision_attn_masks):
        x = self.positioned(x)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attn, ff in self.layers:
            latents = latents + attn(x, latents, vision_attn_masks)
            latents = latents + ff(latents)
        return self.last(latents)

    def last(self, latents):
        latents = super().last(latents)
        return latents if self.projection is None else self.projection(latents)


class ReadsApart(nn.Module):
    """A perceiver attention of flamingo-mini: with two projections, and no axis of media."""

    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__()
        self.heads, self.scale, self.dim_head = heads, dim_head**-0.5, dim_head
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, features, latents):
        if features.ndim != 3:
            raise AssertionError("features have three dimensions")
        latents = self.norm_latents(latents)
        both = torch.cat((self.norm_media(features), latents), 1)
        q, k, v = (
            split(f(x), self.heads) for f, x in ((self.to_q, latents), (self.to_k, both), (self.to_v, both))
        )
        return self.to_out(merge((self.scale * q @ k.transpose(-1, -2)).softmax(-1) @ v))


class ReadsOn(Reads):
    """A block of Otter's resampler."""

    def __init__(self, *, dim, **sizes):
        super().__init__(dim=dim, **sizes)
        self.feed_forward = nn.ModuleList(feed_forward(dim, 4))

    def forward(self, x, latents):
        latents = y = latents + super().forward(x, latents)
        for module in self.feed_forward:
            y = module(y)
        return latents + y


class SumsOn(Sums):
    """Otter's resampler."""

    def __init__(self, *, dim, depth=6, dim_head=64, heads=8, **sizes):
        super().__init__(dim=dim, depth=0, **sizes)
        blocks = (ReadsOn(dim=dim, dim_head=dim_head, heads=heads) for _ in range(depth))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.positioned(x)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for block in self.layers:
            latents = block(x, latents)
        return self.last(latents)


TARGETS = {
    LooksAhead: "open_flamingo_v1.MaskedCrossAttention",
    GatedAhead: "open_flamingo_v1.GatedCrossAttentionBlock",
    ListedAhead: "otter_ai.OtterGatedCrossAttentionBlock",
    LooksFromTheEnd: "open_flamingo_vlm.MaskedCrossAttention",
    SumsProjected: "open_flamingo_vlm.PerceiverResampler",
    ReadsSome: "xgen_mm.PerceiverAttention",
    SumsSome: "xgen_mm.PerceiverResampler",
    LooksAndGives: "flamingo_mini.MaskedCrossAttention",
    GatedAndGives: "flamingo_mini.GatedCrossAttentionBlock",
    ReadsApart: "flamingo_mini.PerceiverAttentionLayer",
    ReadsOn: "otter_ai.OtterPerceiverBlock",
    SumsOn: "otter_ai.OtterPerceiverResampler",
    LooksAtMedia: "open_flamingo.MaskedCrossAttention",
    Gated: "open_flamingo.GatedCrossAttentionBlock",
    Reads: "open_flamingo.PerceiverAttention",
    Sums: "open_flamingo.PerceiverResampler",
}


def target(cls):
    """The known class that a class, or the nearest base of it, looks like."""
    return next(TARGETS[base] for base in cls.__mro__ if base in TARGETS)


def make(cls, **options):
    """A module with random weights, gates too, in the sizes of a user."""
    sizes = dict(SIZES)
    if issubclass(cls, (LooksAtMedia, Gated, GatedAndGives)):
        sizes["dim_visual"] = VISUAL
    if issubclass(cls, Sums):
        sizes |= {"depth": 3, "num_latents": 5, "ff_mult": 2}
    return randomise(cls(**{**sizes, **options}))


def inputs(module, *, batch=2, media=3, text=9, dtype=torch.float32):
    """What a module is called with."""
    random = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    if isinstance(module, (LooksAtMedia, Gated)):
        places = torch.rand(batch, text, generator=random) < 0.3
        return randn(batch, text, SIZES["dim"]), randn(batch, media, 4, VISUAL), places
    if isinstance(module, Reads):
        return randn(batch, media, 6, SIZES["dim"]), randn(batch, media, 3, SIZES["dim"])
    return (randn(batch, media, 2, 4, SIZES["dim"]),)
