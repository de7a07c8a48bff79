"""Patched modules of every family against the originals, on random configurations and inputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis.strategies import booleans, builds, fixed_dictionaries, just, lists, sampled_from
from torch import nn

from flamingo_kernels import patch, use_backend
from flamingo_kernels.testing import tiny
from tests.helpers import families
from tests.helpers.fuzz import beyond_chance, fuzz, seeds
from tests.helpers.parity import assert_parity, hold
from tests.helpers.weights import randomise

DTYPES = sampled_from([torch.float32, torch.bfloat16, torch.float64])
FEW, SIZES = sampled_from([1, 2, 3, 0]), sampled_from([1, 2, 3, 5, 8, 17, 33, 65])
WIDTHS = sampled_from([8, 12, 20, 33])
AXES = sampled_from([None, 0, 1])


@dataclass(frozen=True, kw_only=True)
class Way:
    """How modules are compared: in which dtype and mode, by which kernels, and which parameters learn."""

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    backend: str = "cpu"
    train: bool = False
    inference: bool = False
    frozen: tuple[bool, ...] = (False,)  # in turn over the parameters
    axis: int | None = None  # swapped in memory with the one before the last

    def compare(self, build, call, *shapes) -> None:
        """Hold a patched module against the original, or see that both refuse alike."""
        beyond_chance(lambda seed: self._compare(build, call, shapes, seed))

    def _compare(self, build, call, shapes, seed: int) -> None:
        torch.manual_seed(seed)
        original = build(seed)
        original = original.to(self.dtype).train(self.train)
        for parameter, frozen in zip(original.parameters(), itertools.cycle(self.frozen)):
            parameter.requires_grad_(parameter.requires_grad and not frozen)
        fused = copy.deepcopy(original)
        assert patch(fused).replaced or type(fused) is not type(original)
        makers = [lambda randn, shape=shape: self._lay_out(randn(*shape)) for shape in shapes]
        tensors = [make(torch.randn).to(self.dtype) for make in makers]
        backend = "reference" if self.dtype == torch.float64 else self.backend
        with use_backend(backend), self._autocast():
            try:
                call(original, *tensors)
            except Exception as error:
                with pytest.raises((type(error), ValueError)):  # in its words, or in ours
                    call(fused, *tensors)
                return
            if self.inference and self.dtype != torch.float64:
                self._compare_inference(original, fused, call, tensors)
            else:
                assert_parity(original, fused, *makers, dtype=self.dtype, call=call, count=1)

    @torch.no_grad()
    def _compare_inference(self, original, fused, call, tensors):
        double = copy.deepcopy(original).double()
        with torch.autocast("cpu", enabled=False):
            exact = call(double, *(tensor.double() for tensor in tensors))
        measured = hold("out", call(fused, *tensors), lambda: call(original, *tensors), exact)
        assert measured.passed, measured

    def _autocast(self):
        if not self.autocast or self.dtype == torch.float64:
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def _lay_out(self, tensor):
        if self.axis is None:
            return tensor
        return tensor.transpose(self.axis, -2).contiguous().transpose(self.axis, -2)


WAYS = builds(
    Way,
    dtype=DTYPES,
    autocast=booleans(),
    backend=sampled_from(["cpu", "reference", "cuda"]),
    train=booleans(),
    inference=booleans(),
    frozen=lists(booleans(), max_size=2).map(lambda frozen: (False, *frozen)),
    axis=AXES,
)


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """A cross-attention, alone or in its block, and what it is called with."""

    block: bool = True
    heads: int = 1
    head_dim: int = 8
    immediate: bool = True
    batch: int = 1
    length: int = 1
    media: int = 1
    latents: int = 1
    density: float | None = 0.3  # of images in the text; None for no locations
    integers: torch.dtype | None = None
    cached: bool = False
    surplus: int = 0  # locations that the text has not

    def build(self, family: str) -> nn.Module:
        kind = "GatedCrossAttentionBlock" if self.block else "MaskedCrossAttention"
        sizes = {"heads": self.heads, "dim_head": self.head_dim}
        return families.cross_attention(family, kind, immediate=self.immediate, **sizes)

    def call(self, module: nn.Module, x, media):
        locations = self.locations()
        return (
            module(x, media, locations, use_cached_media=True) if self.cached else module(x, media, locations)
        )

    def locations(self):
        if self.density is None:
            return None
        generator = torch.Generator().manual_seed(self.length)
        surplus = self.surplus if self.length > 1 else 0  # a single row would be broadcast
        places = torch.rand(self.batch, self.length + surplus, generator=generator) < self.density
        return places if self.integers is None else places.to(self.integers)


CROSS_ATTENTIONS = builds(
    CrossAttention,
    block=booleans(),
    heads=sampled_from([1, 2, 3]),
    head_dim=sampled_from([8, 16, 7, 40]),
    immediate=booleans(),
    batch=FEW,
    length=SIZES,
    media=FEW,
    latents=SIZES,
    density=sampled_from([0.3, 0.0, 1.0, None]),
    integers=sampled_from([None, torch.int64, torch.uint8]),
    cached=booleans(),
    surplus=sampled_from([0, 0, 0, 1]),
)


@seeds
@pytest.mark.parametrize("family", families.FAMILIES)
def test_cross_attention(family, fresh):
    def check(drawn, way):
        x = (drawn.batch, drawn.length, families.TEXT)
        media = (drawn.batch, drawn.media, drawn.latents, families.media_width(family))
        way.compare(lambda _: drawn.build(family), drawn.call, x, media)

    # What a patched module takes beyond its original is left out.
    drawn = CROSS_ATTENTIONS
    if not family.startswith("flamingo,") and family != "flamingo":
        drawn = drawn.filter(lambda each: each.media > 0 and each.density is not None)
    if family == "flamingo_pytorch":
        drawn = drawn.filter(lambda each: not each.cached)
    fuzz(check, drawn, WAYS, examples=15, fresh=fresh)


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """A resampler and the features that it reads."""

    heads: int = 1
    head_dim: int = 8
    depth: int = 1
    latents: int = 1
    batch: int = 1
    media: int = 1
    frames: int = 1
    features: int = 1
    embedded: bool = False  # with an embedding for each of three media

    def build(self, family: str) -> nn.Module:
        sizes = {"dim": families.VISUAL, "dim_head": self.head_dim, "heads": self.heads}
        sizes |= {"depth": self.depth, "num_latents": self.latents}
        if family == "flamingo_pytorch":
            sizes["num_media_embeds"] = 3
        elif self.embedded:
            sizes["max_num_media"] = 3
        return randomise(families.library(family).PerceiverResampler(**sizes))


RESAMPLERS = builds(
    Resampler,
    heads=sampled_from([1, 2, 3]),
    head_dim=sampled_from([8, 16, 7, 40]),
    depth=sampled_from([1, 2]),
    latents=SIZES,
    batch=FEW,
    media=FEW,
    frames=sampled_from([1, 2, 3]),
    features=SIZES,
    embedded=booleans(),
)


@seeds
@pytest.mark.parametrize("family", families.FAMILIES[1:])
def test_resampler(family, fresh):
    def check(drawn, way):
        frames = (drawn.frames,) if family != "flamingo_pytorch" else ()
        features = (drawn.batch, drawn.media, *frames, drawn.features, families.VISUAL)
        way.compare(lambda _: drawn.build(family), lambda module, x: module(x), features)

    fuzz(check, RESAMPLERS, WAYS, examples=10, fresh=fresh)


# By name: what a configuration may say.
CONFIGS = {
    "idefics-tiny": {
        "alpha_type": ["float", "vector"],
        "qk_layer_norms": [True, False],
        "use_resampler": [True, False],
        "hidden_act": ["silu", "gelu", "relu"],
        "cross_layer_interval": [2, 1],
        "rms_norm_eps": [1e-6, 1e-2],
    },
    "idefics2-tiny": {
        "resampler_depth": [1, 2],
        "hidden_act": ["silu", "gelu"],
        "rms_norm_eps": [1e-6, 1e-2],
    },
    "mllama-tiny": {
        "num_key_value_heads": [1, 2, 4],
        "hidden_act": ["silu", "gelu", "relu"],
        "rms_norm_eps": [1e-5, 1e-2],
    },
    "evolla-tiny": {
        "resampler_depth": [1, 2],
        "resampler_heads": [1, 2],
        "aligner_ffn_mult": [4, 2],
        "aligner_enable_bias": [True, False],
        "rms_norm_eps": [1e-5, 1e-2],
    },
}
MODEL_SIZES = builds(
    tiny.Sizes,
    batch=sampled_from([1, 2]),
    text=sampled_from([8, 1, 3, 14]),
    images=sampled_from([1, 2, 3]),
    width=sampled_from([16, 32]),
    heads=just(4),
    layers=just(2),
    visual=sampled_from([16, 32]),
    latents=sampled_from([5, 1, 8]),
)
MODEL_WAYS = WAYS.filter(lambda way: not (way.train or way.autocast) and way.dtype != torch.float64)


@seeds
@pytest.mark.parametrize("name", CONFIGS)
def test_model(name, fresh):
    """Whole models of transformers; with a mask in which some rows see no image, or images with a gap."""
    pytest.importorskip("transformers")

    def check(sizes, config, way, masked):
        inputs = tiny.build(name, sizes, **config).inputs
        for key in ("image_attention_mask", "cross_attention_mask"):
            if masked and key in inputs:
                inputs[key] = inputs[key] * torch.randint_like(inputs[key], 2)

        def build(seed):
            model = tiny.build(name, sizes, seed=seed, **config).model
            model.set_attn_implementation("sdpa")
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(not key.endswith("k_layer_norm.bias"))  # a softmax sees none of it
            return model

        def call(model):
            cast = {k: x.to(model.dtype) if x.dtype.is_floating_point else x for k, x in inputs.items()}
            return model(**cast).logits

        way.compare(build, call)

    config = fixed_dictionaries({key: sampled_from(values) for key, values in CONFIGS[name].items()})
    fuzz(check, MODEL_SIZES, config, MODEL_WAYS, booleans(), examples=3, fresh=fresh)
