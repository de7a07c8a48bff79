"""Keys and values of media: one product for all layers, shared by texts, added to, and never twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flamingo import modules
from flamingo_kernels import MediaCache, MediaMask, layers, patch
from flamingo_kernels.commands.measure.memory import saved_bytes
from flamingo_kernels.media_cache import Source, keys_and_values
from tests.helpers.products import Products
from tests.helpers.weights import randomise

SIZES = {"dim": 20, "dim_visual": 12, "dim_head": 8, "heads": 3}
LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()


def blocks(**options):
    model = nn.ModuleList(modules.GatedCrossAttentionBlock(**SIZES, **options) for _ in range(3))
    return randomise(model)


def inputs(media=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 20, generator=generator), torch.randn(2, media, 5, 12, generator=generator)


@pytest.mark.parametrize("options", [{}, {"norm_media": True}, {"policy": "open_flamingo"}], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decoding"])
@torch.no_grad()
def test_a_cache_in_place_of_media(options, cached):
    reference = blocks(**options)
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    x = x[:, :1] if cached else x
    cache = MediaCache(fused, media)
    assert cache.shape == media.shape
    for ours, theirs in zip(fused, reference, strict=True):
        torch.testing.assert_close(
            ours(x, cache, LOCATIONS, cached), theirs(x, media, LOCATIONS, cached), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            ours.attn(x, cache, LOCATIONS, cached),
            theirs.attn(x, media, LOCATIONS, cached),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("recorded", [False, True])
def test_one_product_for_all_layers(device, recorded):
    """Not on a CPU without a backward pass: there it costs more than it saves."""
    fused = blocks(norm_media=True).to(device)
    patch(fused)
    sources = [block.attn.media_source() for block in fused]
    media = torch.randn(2, 2, 5, 12).to(device)
    with torch.set_grad_enabled(recorded), Products() as products:
        every = keys_and_values(sources, media)
    large = [shape for shape in products.shapes if shape[0] == 2 * 2 * 5]
    assert len(large) == (3 if device == "cpu" and not recorded else 1), products.shapes
    assert all(k.shape == v.shape == (2, 2, 5, 3, 8) for k, v in every)


@pytest.mark.parametrize(("rows", "products"), [(47, 3), (48, 1)])
def test_few_media_that_need_a_gradient(rows, products):
    """Fewer than the 48 rows of a weight: weights that are laid side by side would cost more."""
    fused = blocks(norm_media=True)
    patch(fused)
    media = torch.randn(1, 1, rows, 12, requires_grad=True)
    with Products() as counted:
        keys_and_values([block.attn.media_source() for block in fused], media)
    assert len([shape for shape in counted.shapes if shape[0] == rows]) == products, counted.shapes


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decoding"])
@torch.no_grad()
def test_texts_that_share_media(immediate, cached):
    """Three texts a sequence of media, each with images at places of its own."""
    (reference,) = blocks(only_attend_immediate_media=immediate)[:1]
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    x = torch.randn(6, 1 if cached else 6, 20, generator=torch.Generator().manual_seed(1))
    locations = torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    ours = fused(x, MediaCache(fused, media), locations, cached)
    theirs = reference(x, media.repeat_interleave(3, dim=0), locations, cached)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_media_of_a_later_turn():
    (fused,) = blocks(norm_media=True)[:1]
    patch(fused)
    x, media = inputs(media=2)
    cache = MediaCache(fused, media[:, :1])
    cache.append(media[:, 1:])
    assert cache.shape == media.shape
    expected = fused(x, media, LOCATIONS)
    torch.testing.assert_close(fused(x, cache, LOCATIONS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_that_are_not_alike():
    """One has a bias and one an adapter: each gets its own product, by its module."""
    fused = blocks()
    patch(fused)
    fused[0].attn.to_kv = nn.Linear(12, 48)
    fused[1].attn.to_kv.register_forward_hook(lambda module, args, out: 2 * out)
    _, media = inputs()
    cache = MediaCache(fused, media)
    for block in fused:
        for ours, theirs in zip(cache[block.attn], block.attn.media_source().project(media), strict=True):
            assert torch.equal(ours, theirs)


# What is done to the first of three layers, each a norm and a projection.
UNLIKE = {
    "another eps": lambda source: setattr(source.norm, "eps", 0.5),
    "a norm without a bias": lambda source: source.norm.register_parameter("bias", None),
    "a hook on the norm": lambda source: source.norm.register_forward_hook(lambda module, x, out: 2 * out),
    "a hook on the projection": lambda source: source.linear.register_forward_hook(
        lambda module, x, out: 2 * out
    ),
    "a biased projection": lambda source: source.linear.register_parameter(
        "bias", nn.Parameter(torch.randn(48))
    ),
}


class TestRecorded:
    """For a backward pass all keys and values come of one product, where the layers are alike."""

    def sources(self, norm=True, biased=False, **options):
        norms = [nn.LayerNorm(12, **options) if norm else None for _ in range(3)]
        sources = [Source(nn.Linear(12, 48, bias=biased), 3, each) for each in norms]
        for parameter in (each for source in sources for each in source.parameters()):
            nn.init.normal_(parameter)
        return sources

    def assert_each_its_own(self, sources):
        parameters = [each for source in sources for each in source.parameters()]
        media = torch.randn(2, 2, 12, 12, requires_grad=True)
        dout = torch.randn(2, 2, 12, 3, 16)
        found = []
        for every in (keys_and_values(sources, media), [source.project(media) for source in sources]):
            every = [torch.cat(pair, dim=-1) for pair in every]
            found += [every, torch.autograd.grad(every, [media, *parameters], [dout] * 3)]
        torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], found[3], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize(
        "norm", [{}, {"eps": 0.5}, {"bias": False}, {"elementwise_affine": False}, {"norm": False}], ids=str
    )
    def test_layers_alike(self, norm, biased):
        self.assert_each_its_own(self.sources(biased=biased, **norm))

    @pytest.mark.parametrize("change", UNLIKE.values(), ids=UNLIKE)
    def test_one_that_is_not(self, change):
        sources = self.sources()
        change(sources[0])
        self.assert_each_its_own(sources)

    def test_without_norms_one_has_a_bias(self):
        sources = self.sources(norm=False)
        sources[0].linear.bias = nn.Parameter(torch.randn(48))
        self.assert_each_its_own(sources)

    def test_weights_that_are_more_than_numbers(self):
        class Halved(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                out = super().__torch_function__(function, types, args, kwargs)
                return out / 2 if function is torch.nn.functional.linear else out

        sources = self.sources()
        weight = sources[1].linear.weight
        sources[1].linear.weight = nn.Parameter(weight.detach().as_subclass(Halved))
        self.assert_each_its_own(sources)


def test_a_cache_keeps_no_graph():
    fused = blocks(norm_media=True)
    patch(fused)
    _, media = inputs()
    cache = MediaCache(fused, media.requires_grad_())
    cache.append(media)
    assert not any(each.requires_grad for block in fused for each in cache[block.attn])


def test_wrong_use():
    fused, other = blocks(), blocks()
    patch(fused), patch(other)
    x, media = inputs()
    with pytest.raises(ValueError, match="expected a model with fused cross-attention, got Linear"):
        MediaCache(nn.Linear(2, 2), media)
    with pytest.raises(ValueError, match="expected a layer of the model it was made for"):
        other[0](x, MediaCache(fused, media), LOCATIONS)
    with pytest.raises(ValueError, match="MediaCache with a divisor of that, got 2"):
        fused[0](torch.zeros(3, 6, 20), MediaCache(fused, media), LOCATIONS[:1].expand(3, -1))


class TestDtype:
    """A cache is in the dtype that the projections gave when it was made."""

    def made(self, *, autocast):
        fused = blocks()
        patch(fused)
        x, media = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused, x, media, MediaCache(fused, media)

    @pytest.mark.parametrize("length", [1, 6])
    @pytest.mark.parametrize("whole", [True, False], ids=["block", "attention"])
    @torch.no_grad()
    def test_made_under_autocast_and_used_without(self, length, whole):
        fused, x, _, cache = self.made(autocast=True)
        layer = fused[0] if whole else fused[0].attn
        message = r"keys and values in torch.float32 like x, got torch.bfloat16; make .* torch.autocast"
        with pytest.raises(TypeError, match=message):
            layer(x[:, :length], cache, LOCATIONS, length == 1)

    @pytest.mark.parametrize("made", [True, False])
    @pytest.mark.parametrize("length", [1, 6])
    @torch.no_grad()
    def test_used_under_autocast(self, made, length):
        fused, x, media, cache = self.made(autocast=made)
        x, follows = x[:, :length], length == 1
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                expected = fused[0](x, media, LOCATIONS, follows)
                got = fused[0](x, cache, LOCATIONS, follows)
            assert (got - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()

    def test_added_to_in_another_dtype(self):
        _, _, media, cache = self.made(autocast=True)
        with pytest.raises(TypeError, match=r"media whose keys are in torch.bfloat16 like those before"):
            cache.append(media)
        assert cache.shape == media.shape

    @pytest.mark.parametrize("recorded", [False, True])
    def test_a_norm_of_media_in_float32_beside_a_projection_in_bfloat16(self, recorded):
        block = blocks(norm_media=True)[0].bfloat16()
        block.attn.norm_media.float()
        reference = copy.deepcopy(block)
        patch(block)
        _, media = inputs()
        source = block.attn.media_source()
        with torch.set_grad_enabled(recorded):
            ((k, v),) = keys_and_values([source], media.bfloat16())
            expected = reference.attn.to_kv(reference.attn.norm_media(media.bfloat16()))
        torch.testing.assert_close(torch.cat([k, v], dim=-2).flatten(-2), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rule", ["last_preceding", "all_preceding"])
def test_a_joined_mask_is_that_of_each_text(rule):
    locations = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    mask = getattr(MediaMask, rule)(locations, 3)
    joined = mask.fold(3)
    assert torch.equal(joined.dense(2), mask.dense(2).view(2, 1, 27, 6))
    for b in range(2):
        for medium in range(3):
            rows = joined.sees(medium)[b].nonzero()
            start, stop = joined.start[b, medium], joined.stop[b, medium]
            assert all(start <= row < stop for row in rows)


class TestResampler:
    SIZES = {"dim": 24, "depth": 3, "dim_head": 8, "heads": 3, "num_latents": 5}

    def pair(self):
        reference = randomise(modules.PerceiverResampler(**self.SIZES))
        fused = copy.deepcopy(reference)
        patch(fused)
        return reference, fused

    def test_one_product_for_all_layers_and_one_norm_of_the_features(self, monkeypatch):
        _, fused = self.pair()
        calls = []
        monkeypatch.setattr(
            layers.resampler,
            "keys_and_values",
            lambda *args: calls.append(len(args[0])) or keys_and_values(*args),
        )
        fused(torch.randn(1, 2, 1, 9, 24))
        assert calls == [3]

    def test_frozen_features_cost_no_product_backward(self):
        """And the parameters of the media's norm have the gradients of the original all the same."""
        reference, fused = self.pair()
        x = torch.randn(1, 2, 1, 9, 24)
        grads = []
        for module in (reference, fused):
            module(x).square().sum().backward()
            grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
        assert grads[0].keys() == grads[1].keys()
        for name, theirs in grads[0].items():
            torch.testing.assert_close(grads[1][name], theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max())

    def test_keeps_less_for_the_backward_pass(self):
        sizes = {"dim": 64, "depth": 3, "dim_head": 16, "heads": 4, "num_latents": 16}
        reference = randomise(modules.PerceiverResampler(**sizes))
        fused = copy.deepcopy(reference)
        patch(fused)
        x = torch.randn(1, 8, 1, 64, 64)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
        ours, theirs = (saved_bytes(lambda m=module: m(x), module) for module in (fused, reference))
        assert ours <= 0.6 * theirs

    def test_hooks_are_still_called(self):
        reference, fused = self.pair()
        for module in (reference, fused):
            module.layers[1][0].register_forward_hook(lambda module, args, out: 2 * out)
            module.layers[2][1][1].register_forward_hook(lambda module, args, out: 3 * out)
        x = torch.randn(1, 2, 1, 9, 24)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
