"""When modules are taken apart for a sublayer, and when they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flamingo import modules
from flamingo_kernels import patch
from flamingo_kernels.layers import cross_attention, fused
from flamingo_kernels.sublayers import Linear, Norm
from flamingo_kernels.sublayers.arguments import (
    as_activation,
    as_cross_attention,
    as_feed_forward,
    as_linear,
    as_norm,
)

LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("length", "gradients", "expected"),
    [(1, False, []), (2, False, ["attention", "feed-forward"]), (1, True, ["attention", "feed-forward"])],
    ids=["a step", "two tokens", "a token in training"],
)
def test_a_step_of_decoding_calls_modules(length, gradients, expected, monkeypatch):
    calls = []
    for home, name, part in (
        (cross_attention, "gated_cross_attention", "attention"),
        (fused, "gated_feed_forward", "feed-forward"),
    ):
        sublayer = getattr(home, name)

        def call(*args, part=part, sublayer=sublayer, **kwargs):
            calls.append(part)
            return sublayer(*args, **kwargs)

        monkeypatch.setattr(home, name, call)
    block = modules.GatedCrossAttentionBlock(dim=16, dim_visual=8, dim_head=4, heads=2)
    for gate in (block.attn_gate, block.ff_gate):
        torch.nn.init.constant_(gate, 0.7)
    x, media = torch.randn(2, length, 16), torch.randn(2, 2, 5, 8)
    with torch.set_grad_enabled(gradients):
        expected_z = block(x, media, LOCATIONS, use_cached_media=True)
        patch(block)
        z = block(x, media, LOCATIONS, use_cached_media=True)
    torch.testing.assert_close(z, expected_z)
    assert calls == expected


X = torch.randn(2, 3, 8)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (modules.SquaredReLU(), "squared_relu"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), None),
        (hooked(nn.GELU()), None),
    ],
    ids=str,
)
def test_what_an_activation_is_taken_for(module, name):
    assert as_activation(module) == name


def test_an_activation_of_transformers_is_known_by_what_it_calls():
    activations = pytest.importorskip("transformers.activations")
    assert as_activation(activations.GELUActivation()) == "gelu"
    assert as_activation(activations.GELUActivation(use_gelu_python=True)) is None


def test_a_norm_keeps_its_parameters_and_its_eps():
    norm = nn.LayerNorm(8, eps=0.25)
    assert as_norm(norm, X) == Norm(norm.weight, norm.bias, 0.25)
    unbiased = nn.LayerNorm(8, bias=False)
    assert as_norm(unbiased, X) == Norm(unbiased.weight)
    for other in (nn.LayerNorm((3, 8)), nn.LayerNorm(8, elementwise_affine=False), hooked(nn.LayerNorm(8))):
        assert as_norm(other, X) is None


def test_an_rms_norm_has_the_dtype_of_the_text():
    idefics = pytest.importorskip("transformers.models.idefics.modeling_idefics")
    norm = idefics.IdeficsRMSNorm(8, eps=0.25)
    assert as_norm(norm, X) == Norm(norm.weight, eps=0.25, rms=True)
    assert as_norm(norm, X.bfloat16()) is None


def test_a_layer_keeps_its_bias():
    layer = nn.Linear(8, 4)
    assert as_linear(layer, X) == Linear(layer.weight, layer.bias)
    assert as_linear(hooked(nn.Linear(8, 4)), X) is None


def test_a_layer_has_the_dtype_of_the_text_or_one_that_autocast_casts():
    layer, wide = nn.Linear(8, 4).bfloat16(), nn.Linear(8, 4).double()
    assert as_linear(layer, X) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert as_linear(layer, X) == Linear(layer.weight, layer.bias)
        assert as_linear(wide, X) is None


def test_one_part_that_is_not_plain_leaves_the_whole_to_its_modules():
    norm, layers = nn.LayerNorm(8), [nn.Linear(8, 8) for _ in range(3)]
    feed_forward = (norm, layers[0], nn.GELU(), layers[1], layers[2])
    attention = (norm, layers[0], layers[1], nn.LayerNorm(4))
    for take_apart, parts in ((as_feed_forward, feed_forward), (as_cross_attention, attention)):
        assert take_apart(X, *parts) is not None
        for place in range(len(parts)):
            spoilt = [nn.Identity() if at == place else part for at, part in enumerate(parts)]
            assert take_apart(X, *spoilt) is None, place
