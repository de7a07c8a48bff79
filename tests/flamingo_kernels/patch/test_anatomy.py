"""A module is swapped if it is made of what its class makes, and of nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flamingo_kernels import layers, patch
from flamingo_kernels._anatomy import Sizes
from flamingo_kernels.testing import tiny
from tests.helpers.families import (
    FAMILIES,
    HEADS,
    TEXT,
    cross_attention,
    media_width,
    perceiver_attention,
    resampler,
)

LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()


def inputs(family):
    return torch.randn(2, 6, TEXT), torch.randn(2, 2, 5, media_width(family)), LOCATIONS


class Adapter(nn.Module):
    """A linear layer with something beside it, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.more = nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


def swap(name, change):
    def swapped(attn):
        setattr(attn, name, change(getattr(attn, name)))

    return swapped


# What is done to an attention of three heads of eight numbers, and why it is then left alone.
OTHERS = {
    "a parameter": (
        lambda attn: attn.register_parameter("bias", nn.Parameter(torch.ones(1))),
        "bias is not one",
    ),
    "a buffer": (lambda attn: attn.register_buffer("seen", torch.ones(1)), "seen is not one of its parts"),
    "a tensor": (lambda attn: setattr(attn, "shift", torch.ones(1)), "shift is not one of its parts"),
    "a child": (lambda attn: setattr(attn, "dropout", nn.Dropout(0.5)), "dropout is not one of its parts"),
    "a function": (
        lambda attn: setattr(attn, "attend", lambda *args: args[0]),
        "attend is not one of its parts",
    ),
    "a learnt scale": (
        lambda a: setattr(a, "scale", nn.Parameter(torch.ones(1))),
        "scale is not one of its parts",
    ),
    "other heads": (
        lambda attn: setattr(attn, "heads", 5),
        "to_q has out_features=24, expected H*d with H=5",
    ),
    "no number": (lambda attn: setattr(attn, "heads", "3"), "heads is '3', expected H"),
    "fewer keys": (
        swap("to_kv", lambda linear: nn.Linear(linear.in_features, 24, bias=False)),
        "to_kv has out_features=24, expected 2*H*d with H=3, d=8",
    ),
    "another width": (
        swap("to_out", lambda _: nn.Linear(24, TEXT + 1)),
        "to_out has out_features=21, expected D",
    ),
    "no projection": (swap("to_out", lambda _: nn.Identity()), "to_out is a Identity, expected a Linear"),
    "a chain": (swap("to_out", nn.Sequential), "to_out is a Sequential, expected a Linear"),
    "another norm": (
        swap("norm", lambda _: nn.BatchNorm1d(6)),
        "norm is a BatchNorm1d, expected a LayerNorm",
    ),
    "a wide norm": (swap("norm", lambda _: nn.LayerNorm((6, TEXT))), "norm is over (6, 20), expected D"),
    "no norm": (lambda attn: setattr(attn, "norm", None), "norm is missing"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("change", "reason"), OTHERS.values(), ids=OTHERS)
def test_an_attention_of_other_parts_is_left_alone(family, change, reason):
    attn = cross_attention(family, "MaskedCrossAttention")
    if "scale" in reason:
        del attn.scale
    change(attn)
    cls = type(attn)
    found = patch(attn).skipped[""]
    assert found.startswith(f"MaskedCrossAttention: {reason}"), found
    assert type(attn) is cls


def test_what_a_subclass_adds_is_seen():
    from flamingo import modules

    class More(modules.GatedCrossAttentionBlock):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.more = nn.Linear(2, 2)

    block = More(dim=TEXT, dim_visual=12)
    assert patch(block).skipped == {"": "More: more is not one of its parts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resampler_of_other_parts_is_left_alone(family):
    module = resampler(family)
    module.projection = nn.Linear(12, 12)
    module.layers[0][0].to_kv = nn.Linear(12, 24)
    skipped = patch(module).skipped
    assert skipped[""] == "PerceiverResampler: projection is not one of its parts"
    assert skipped["layers.0.0"].startswith("PerceiverAttention: to_kv has out_features=24")
    assert isinstance(module.layers[1][0], layers.Fused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1,), (TEXT,), (1, 1, TEXT), ()], ids=str)
def test_gates_of_one_number_or_one_a_channel(family, shape):
    block = cross_attention(family)
    block.attn_gate = nn.Parameter(torch.randn(shape))
    expected = block(*inputs_of(family))
    assert "" in patch(block).replaced
    torch.testing.assert_close(block(*inputs_of(family)), expected, rtol=1e-4, atol=1e-5)


def inputs_of(family):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, TEXT), (2, 2, 5, media_width(family))
    return *(torch.randn(shape, generator=generator) for shape in shapes), LOCATIONS


@pytest.mark.parametrize("shape", [(3,), (6, TEXT), (6, 1), (0,)], ids=str)
def test_other_gates_are_left_alone(shape):
    block = cross_attention("open_flamingo")
    block.ff_gate, block.attn_gate = nn.Parameter(torch.randn(TEXT)), nn.Parameter(torch.randn(shape))
    assert "gate has shape" in patch(block).skipped[""]


@pytest.mark.parametrize("shape", [(5, 1, 12), (5, 12, 1)], ids=str)
def test_latents_of_another_shape_are_left_alone(shape):
    module = resampler("open_flamingo")
    module.latents = nn.Parameter(torch.randn(shape))
    assert "latents has shape" in patch(module).skipped[""]


ALLOWED = {
    "an adapter": swap("to_q", Adapter),
    "adapters everywhere": lambda attn: [
        setattr(attn, name, Adapter(getattr(attn, name))) for name in ("to_q", "to_kv", "to_out")
    ],
    "a subclass": swap("to_q", lambda linear: with_class(linear, type("Other", (nn.Linear,), {}))),
    "a bias": swap("to_q", lambda linear: nn.Linear(linear.in_features, linear.out_features)),
    "integers": swap("to_kv", lambda linear: torch.ao.nn.quantized.dynamic.Linear.from_float(qat(linear))),
    "a parametrization": lambda attn: nn.utils.parametrizations.weight_norm(attn.to_q),
    "another library's norm": swap("norm", lambda norm: OtherNorm(norm)),
    "numbers and words": lambda attn: vars(attn).update(note="mine", count=3, seen=[1], config={"a": 1}),
    "a norm without weights": swap("norm", lambda _: nn.LayerNorm(TEXT, elementwise_affine=False)),
}


class OtherNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return x * self.weight


def with_class(module, cls):
    module.__class__ = cls
    return module


def qat(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@torch.no_grad()
def test_what_stands_in_for_a_part_is_called(family, change):
    block = cross_attention(family)
    change(block.attn)
    fused, tensors = copy.deepcopy(block), inputs(family)
    assert set(patch(fused).replaced) == {"", "attn"}
    torch.testing.assert_close(fused(*tensors), block(*tensors), rtol=1e-4, atol=1e-4)


def test_a_perceiver_of_adapters():
    attn = perceiver_attention("open_flamingo")
    for name in ("to_q", "to_kv", "to_out"):
        setattr(attn, name, Adapter(getattr(attn, name)))
    fused, x, latents = copy.deepcopy(attn), torch.randn(2, 3, 7, 12), torch.randn(2, 3, 5, 12)
    assert patch(fused).replaced
    torch.testing.assert_close(fused(x, latents), attn(x, latents), rtol=1e-4, atol=1e-4)


class TestTransformers:
    SIZES = tiny.Sizes(batch=1, text=6, images=2, width=16, heads=2, layers=2, visual=8, latents=3)

    @pytest.fixture
    def build(self):
        pytest.importorskip("transformers")
        return lambda name: tiny.build(name, self.SIZES).model

    def test_another_activation_of_a_gate(self, build):
        model = build("idefics-tiny")
        layer = next(module for module in model.modules() if hasattr(module, "act_cross_attn"))
        layer.act_cross_attn = nn.Sigmoid()
        reason = "IdeficsGatedCrossAttentionLayer: act_cross_attn is a Sigmoid, expected a Tanh"
        assert reason in patch(model).skipped.values()

    @pytest.mark.parametrize(
        ("name", "cls", "number", "term"),
        [
            ("mllama-tiny", "MllamaTextCrossAttention", "num_key_value_groups", "G*n"),
            ("idefics2-tiny", "Idefics2PerceiverAttention", "head_dim", "G*n*d"),
            ("idefics-tiny", "IdeficsPerceiverAttention", "n_heads", "H*d"),
            ("evolla-tiny", "EvollaSequenceAlignerCrossAttention", "attention_head_size", "H*d"),
        ],
    )
    def test_other_numbers(self, build, name, cls, number, term):
        model = build(name)
        for module in model.modules():
            if type(module).__name__ == cls:
                setattr(module, number, 7)
        reasons = [reason for reason in patch(model).skipped.values() if reason.startswith(f"{cls}: ")]
        assert reasons
        assert all(f"expected {term} with" in reason for reason in reasons)


class TestSizes:
    def test_one_after_another(self):
        sizes = Sizes()
        assert sizes.fit("H", HEADS)
        assert sizes.fit("2*H*d", 6 * HEADS)
        assert sizes == {"H": HEADS, "d": 3}
        assert not sizes.fit("H*d", 3 * HEADS + 1)
        assert not sizes.fit("H*e", 3 * HEADS + 1)
        assert Sizes().fit("D", 0)

    def test_in_words(self):
        assert Sizes(H=3, d=8).expected("2*H*d*D") == "2*H*d*D with H=3, d=8"
        assert Sizes().expected("D") == "D"
