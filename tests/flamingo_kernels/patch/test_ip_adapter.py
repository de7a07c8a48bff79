"""The resampler of IP-Adapter, by classes in our own words that compute the same, and some that do not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo_kernels import UnsupportedError, patch, unpatch, use_backend
from flamingo_kernels.patch import ip_adapter
from flamingo_kernels.patch.known import KNOWN
from flamingo_kernels.patch.source import code_hash
from flamingo_kernels.patch.swap import swap
from tests.helpers.lookalikes import feed_forward, merge, split
from tests.helpers.parity import assert_parity
from tests.helpers.weights import randomise

WIDTH, FEATURES = 16, 12
SIZES = {"dim": WIDTH, "dim_head": 8, "heads": 3}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


class Looks(nn.Module):
    """A PerceiverAttention."""

    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__()
        self.dim_head, self.heads = dim_head, heads
        self.scale = 3.0  # not read
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, latents):
        x, latents = self.normed(x, latents)
        k, v = (split(each, self.heads) for each in self.to_kv(self.seen(x, latents)).chunk(2, -1))
        q = split(self.to_q(latents), self.heads)
        p = F.softmax(self.scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
        return self.to_out(merge(p @ v))

    def normed(self, x, latents):
        return self.norm1(x), self.norm2(latents)

    def seen(self, x, latents):
        return torch.cat([x, latents], 1)

    def scores(self, q, k):
        root = self.dim_head**-0.25
        return (root * q) @ (root * k).mT


class Summary(nn.Module):
    """A Resampler."""

    def __init__(
        self,
        dim=1024,
        depth=8,
        dim_head=64,
        heads=16,
        num_queries=8,
        embedding_dim=768,
        output_dim=1024,
        ff_mult=4,
        max_seq_len=257,
        apply_pos_emb=False,
        num_latents_mean_pooled=0,
    ):
        super().__init__()
        self.pos_emb = nn.Embedding(max_seq_len, embedding_dim) if apply_pos_emb else None
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim))
        self.proj_in, self.proj_out = nn.Linear(embedding_dim, dim), nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.to_latents_from_mean_pooled_seq = None
        if num_latents_mean_pooled:
            self.to_latents_from_mean_pooled_seq = nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, num_latents_mean_pooled * dim),
                nn.Unflatten(1, (num_latents_mean_pooled, dim)),
            )
        self.layers = nn.ModuleList(
            nn.ModuleList([Looks(dim=dim, dim_head=dim_head, heads=heads), feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )

    def forward(self, x):
        x = self.proj_in(self.positioned(x))
        latents = self.latents.expand(len(x), -1, -1)
        if self.to_latents_from_mean_pooled_seq is not None:
            mean = x.sum(1) / torch.full((len(x), 1), float(x.shape[1]))  # float32, which halves become
            latents = torch.cat([self.to_latents_from_mean_pooled_seq(mean), latents], 1)
        for attn, ff in self.layers:
            latents = latents + attn(x, latents)
            latents = latents + ff(latents)
        return self.last(latents)

    def positioned(self, x):
        return x if self.pos_emb is None else x + self.pos_emb.weight[: x.shape[1]]

    def last(self, latents):
        return self.norm_out(self.proj_out(latents))


LIKE = {Looks: "ip_adapter.PerceiverAttention", Summary: "ip_adapter.Resampler"}


def attention(cls=Looks, **sizes):
    return randomise(cls(**{**SIZES, **sizes}))


def resampler(cls=Summary, **options):
    sizes = {"depth": 2, "num_queries": 5, "embedding_dim": FEATURES, "output_dim": 10, "ff_mult": 2}
    return randomise(cls(**{**SIZES, **sizes, **options}))


def swapped(module):
    """A copy with the fused classes, without a trial."""
    fused = copy.deepcopy(module)
    for each in fused.modules():
        if isinstance(each, (Looks, Summary)):
            swap(each, ip_adapter.PerceiverAttention if isinstance(each, Looks) else ip_adapter.Resampler)
    return fused


class TestAttention:
    @backends
    @dtypes
    def test_parity(self, backend, dtype):
        original = attention().to(dtype)
        with use_backend(backend):
            assert_parity(original, swapped(original), (2, 7, WIDTH), (2, 5, WIDTH), dtype=dtype)

    @pytest.mark.parametrize(("batch", "features", "latents"), [(1, 1, 1), (3, 2, 6), (1, 70, 33)])
    def test_sizes(self, batch, features, latents):
        original = attention()
        shapes = (batch, features, WIDTH), (batch, latents, WIDTH)
        assert_parity(original, swapped(original), *shapes, count=1)

    def test_large_scores(self):
        """Beyond the range of exp, where a scale that is wrong chooses another key."""
        original, tensors = attention(), (torch.randn(2, 7, WIDTH) * 1e3, torch.randn(2, 5, WIDTH))
        with torch.no_grad():
            original.to_q.weight *= 20
        torch.testing.assert_close(swapped(original)(*tensors), original(*tensors), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("part", ["norm1", "norm2", "to_kv"])
    def test_hooks_see_the_originals_calls(self, part):
        original = attention()
        fused, seen = swapped(original), []
        getattr(fused, part).register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
        tensors = torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH)
        assert torch.equal(fused(*tensors), original(*tensors))
        assert seen == [{"norm1": (2, 7, WIDTH), "norm2": (2, 5, WIDTH), "to_kv": (2, 12, 48)}[part]]

    def test_a_scale_that_somebody_sets(self):
        """It is not read; the size of a head is."""
        original = attention()
        fused, tensors = swapped(original), (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH))
        expected = original(*tensors)
        original.scale = fused.scale = 100.0
        torch.testing.assert_close(fused(*tensors), expected)
        original.dim_head = fused.dim_head = 2
        torch.testing.assert_close(fused(*tensors), original(*tensors))
        assert not torch.allclose(fused(*tensors), expected)
        with pytest.raises(UnsupportedError, match=r"to_q has out_features=24, expected H\*d with H=3, d=2"):
            patch(original, like={Looks: LIKE[Looks]})


class TestResampler:
    @backends
    @dtypes
    @pytest.mark.parametrize("places", [False, True], ids=["plain", "places"])
    def test_parity(self, backend, dtype, places):
        original = resampler(apply_pos_emb=places, max_seq_len=9).to(dtype)
        with use_backend(backend):
            assert_parity(original, swapped(original), (2, 7, FEATURES), dtype=dtype)

    def test_many_features(self):
        """More than a weight has rows, so that all layers' keys and values come of one product."""
        original = resampler()
        assert_parity(original, swapped(original), (4, 20, FEATURES), count=1)

    def test_latents_of_the_mean(self):
        original = resampler(num_latents_mean_pooled=3, apply_pos_emb=True)
        fused = swapped(original)
        assert_parity(original, fused, (2, 7, FEATURES))
        assert fused(torch.randn(2, 7, FEATURES)).shape == (2, 8, 10)

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_without_gradients(self, batch):
        original = resampler()
        fused, x = swapped(original), torch.randn(batch, 6, FEATURES)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), original(x))

    @pytest.mark.parametrize("pooled", [0, 2])
    def test_autocast(self, pooled):
        original = resampler(num_latents_mean_pooled=pooled)
        with torch.autocast("cpu", torch.bfloat16):
            assert_parity(original, swapped(original), (2, 7, FEATURES))

    @pytest.mark.parametrize("older", [False, True])
    def test_a_trial(self, older):
        cls = Older if older else Summary
        original = resampler(cls, num_latents_mean_pooled=2, heads=4, dim_head=16)
        fused = copy.deepcopy(original)
        report = patch(fused, like={Looks: LIKE[Looks], cls: LIKE[Summary]})
        assert list(report.replaced) == ["", "layers.0.0", "layers.1.0"]
        x = torch.randn(2, 7, FEATURES)
        torch.testing.assert_close(fused(x), original(x))

    def test_hooks_on_a_part(self):
        original = resampler()
        fused, seen = swapped(original), []
        fused.layers[1][0].to_kv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        x = torch.randn(2, 7, FEATURES)
        torch.testing.assert_close(fused(x), original(x))
        assert seen == [(2, 12, 48)]

    @pytest.mark.parametrize("layers", [[], [0], [0, 1]], ids=str)
    def test_attentions_that_were_put_in_later(self, layers):
        """Then, or without a layer, the original's forward calls what is there."""
        original = resampler()
        fused = swapped(original)
        for model in (original, fused):
            for index in layers:
                model.layers[index][0] = copy.deepcopy(original.layers[index][0])
                model.layers[index][0].__class__ = LooksAtTheFeatures
            if not layers:
                model.layers = nn.ModuleList()
        x = torch.randn(2, 7, FEATURES)
        torch.testing.assert_close(fused(x), original(x))

    def test_it_is_known_by_its_code(self, monkeypatch):
        for cls, target in LIKE.items():
            place = target.replace("ip_adapter.", "ip_adapter.resampler.")
            code = code_hash(cls, cls.__module__, origin="ip_adapter.resampler")
            monkeypatch.setitem(KNOWN, place, {**KNOWN[place], code: "ours"})
        original = resampler()
        model = nn.ModuleDict({"image_proj": copy.deepcopy(original)})
        report = patch(model)
        copies = {
            "image_proj": "a copy of ip_adapter.Resampler",
            "image_proj.layers.0.0": "a copy of ip_adapter.PerceiverAttention",
            "image_proj.layers.1.0": "a copy of ip_adapter.PerceiverAttention",
        }
        assert report.notes == copies
        assert report.policies == ()
        x = torch.randn(2, 7, FEATURES)
        torch.testing.assert_close(model["image_proj"](x), original(x))
        unpatch(model)
        assert torch.equal(model["image_proj"](x), original(x))


class Older(Summary):
    """As before positions and latents of the mean: it does not have them even as None."""

    def __init__(self, **sizes):
        sizes.pop("num_latents_mean_pooled", None)
        super().__init__(**sizes)
        del self.pos_emb, self.to_latents_from_mean_pooled_seq

    def forward(self, x):
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for attn, ff in self.layers:
            latents = latents + attn(x, latents)
            latents = latents + ff(latents)
        return self.last(latents)


class LooksAtTheFeatures(Looks):
    """As one of PuLID's, which has the same parts."""

    def seen(self, x, latents):
        return x


class NormsExchanged(Looks):
    def normed(self, x, latents):
        return self.norm2(x), self.norm1(latents)


class ScaledOnce(Looks):
    def scores(self, q, k):
        return q @ k.mT * self.dim_head**-0.25


class ScaledByItsScale(Looks):
    def scores(self, q, k):
        return q @ k.mT * self.scale


class LatentsFirst(Looks):
    """The order of keys is of no account."""

    def seen(self, x, latents):
        return torch.cat([latents, x], 1)


class LatentsComeFirst(Looks):
    def forward(self, latents, x):
        return super().forward(x, latents)


class NormedTwice(Summary):
    def last(self, latents):
        return self.norm_out(super().last(latents))


class PositionsFromOne(Summary):
    def positioned(self, x):
        return x + self.pos_emb.weight[1 : x.shape[1] + 1]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (LooksAtTheFeatures, "the result differs"),
        (NormsExchanged, "the result differs"),
        (ScaledOnce, "the result differs"),
        (ScaledByItsScale, "the result differs"),
        (LatentsComeFirst, "its forward takes latents in another place"),
    ],
)
def test_another_attention_is_refused(cls, reason):
    with pytest.raises(UnsupportedError, match=reason):
        patch(attention(cls), like={cls: "ip_adapter.PerceiverAttention"})


def test_keys_in_another_order():
    original = attention(LatentsFirst)
    fused, tensors = copy.deepcopy(original), (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH))
    patch(fused, like={LatentsFirst: "ip_adapter.PerceiverAttention"})
    torch.testing.assert_close(fused(*tensors), original(*tensors))


@pytest.mark.parametrize("cls", [NormedTwice, PositionsFromOne])
def test_another_resampler_is_refused(cls):
    model = resampler(cls, apply_pos_emb=True)
    with pytest.raises(UnsupportedError, match="the result differs"):
        patch(model, like={cls: "ip_adapter.Resampler", Looks: "ip_adapter.PerceiverAttention"})
