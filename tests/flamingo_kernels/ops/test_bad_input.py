"""Every mistake of a caller gets an error that names the operator, what was expected, and what came."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels import (
    MediaMask,
    UnsupportedError,
    gated_residual,
    linear,
    masked_cross_attention,
    perceiver_attention,
)

LOCATIONS = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])


def masked(**changed):
    """A good call of masked_cross_attention but for what is changed."""
    media = torch.zeros(2, 3, 4, 2, 8)
    good = {
        "q": torch.zeros(2, 5, 4, 8),
        "k": media,
        "v": media,
        "mask": MediaMask.last_preceding(LOCATIONS, 3),
    }
    return masked_cross_attention(**{**good, **changed})


def perceiver(**changed):
    media, latents = torch.zeros(2, 6, 2, 8), torch.zeros(2, 3, 2, 8)
    good = {"q": torch.zeros(2, 3, 4, 8), "k_media": media, "v_media": media, "k_latents": latents}
    return perceiver_attention(**{**good, "v_latents": latents, **changed})


def residual(**changed):
    good = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 8), "gate": torch.zeros(1)}
    return gated_residual(**{**good, **changed})


def layer(**changed):
    good = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    good |= {"residual": torch.zeros(2, 5, 4), "gate": torch.zeros(4)}
    return linear(**{**good, **changed})


OPERATORS = {
    masked: "masked_cross_attention",
    perceiver: "perceiver_attention",
    residual: "gated_residual",
    layer: "linear",
}


def mask(batch: int = 2, length: int = 5, media: int = 3) -> MediaMask:
    return MediaMask.last_preceding(torch.zeros(batch, length, dtype=torch.bool), media)


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


META = {"device": "meta"}
BF16 = {"dtype": torch.bfloat16}

ERRORS = [
    # shapes
    (masked, {"q": zeros(2, 5, 32)}, ValueError, r"expected q with shape \(B, T, H, d\).*got \(2, 5, 32\)"),
    (
        masked,
        {"k": zeros(2, 12, 2, 8)},
        ValueError,
        r"k with shape \(2, M, R, Hkv, 8\) to match q, got \(2, 12, 2, 8\)",
    ),
    (masked, {"k": zeros(3, 3, 4, 2, 8)}, ValueError, r"k with shape \(2, .*got \(3, 3, 4, 2, 8\)"),
    (masked, {"k": zeros(2, 3, 4, 2, 9)}, ValueError, r"k with shape .*got \(2, 3, 4, 2, 9\)"),
    (
        masked,
        {"v": zeros(2, 3, 5, 2, 8)},
        ValueError,
        r"v with shape \(2, 3, 4, 2, 8\) to match k, got \(2, 3, 5, 2, 8\)",
    ),
    (masked, {"q": zeros(2, 5, 3, 8)}, ValueError, r"the 3 heads of q to be a multiple of .*got 2"),
    (
        masked,
        {"k": zeros(2, 3, 0, 2, 8), "v": zeros(2, 3, 0, 2, 8)},
        ValueError,
        r"at least one latent key, got k \(2, 3, 0, 2, 8\)",
    ),
    (perceiver, {"q": zeros(6, 4, 8)}, ValueError, r"expected q with shape \(N, R, H, d\).*got \(6, 4, 8\)"),
    (
        perceiver,
        {"k_media": zeros(3, 6, 2, 8)},
        ValueError,
        r"k_media with shape \(2, S, .*got \(3, 6, 2, 8\)",
    ),
    (
        perceiver,
        {"v_media": zeros(2, 7, 2, 8)},
        ValueError,
        r"v_media with shape \(2, 6, .*got \(2, 7, 2, 8\)",
    ),
    (
        perceiver,
        {"k_latents": zeros(2, 3, 1, 8)},
        ValueError,
        r"k_latents with shape \(2, L, 2, .*got \(2, 3, 1, 8\)",
    ),
    (
        perceiver,
        {"v_latents": zeros(2, 4, 2, 8)},
        ValueError,
        r"v_latents with shape \(2, 3, .*got \(2, 4, 2, 8\)",
    ),
    (perceiver, {"q": zeros(2, 3, 3, 8)}, ValueError, r"the 3 heads of q to be a multiple of .*got 2"),
    (
        perceiver,
        {"k_latents": zeros(2, 0, 2, 8), "v_latents": zeros(2, 0, 2, 8)},
        ValueError,
        r"at least one latent key, got k_latents \(2, 0, 2, 8\)",
    ),
    (
        perceiver,
        {"media_lengths": torch.tensor([1, 2, 3])},
        ValueError,
        r"media_lengths with shape \(2,\) to match q.*got \(3,\)",
    ),
    (residual, {"x": torch.tensor(1.0)}, ValueError, r"expected x with shape \(..., D\), got \(\)"),
    (
        residual,
        {"y": zeros(2, 5, 7)},
        ValueError,
        r"expected y with shape \(2, 5, 8\) to match x, got \(2, 5, 7\)",
    ),
    (residual, {"y": zeros(8)}, ValueError, r"expected y with shape \(2, 5, 8\) to match x, got \(8,\)"),
    (residual, {"gate": zeros(5)}, ValueError, r"a gate of 1 or D=8 elements, got \(5,\)"),
    (residual, {"gate": zeros(0)}, ValueError, r"a gate of 1 or D=8 elements, got \(0,\)"),
    (residual, {"gate": zeros(8, 1)}, ValueError, r"gate .*got \(8, 1\)"),
    (
        residual,
        {"y": zeros(2, 5, 8, **META)},
        ValueError,
        r"y on cpu with x, got meta; .*\.to\(x\.device\)",
    ),
    (residual, {"gate": zeros(1, **META)}, ValueError, r"gate on cpu with x, got meta"),
    (residual, {"x": zeros(2, 5, 8, dtype=torch.int64)}, TypeError, r"floating-point x, got torch.int64"),
    (residual, {"gate": zeros(1, dtype=torch.int64)}, TypeError, r"floating-point gate, got torch.int64"),
    (layer, {"x": torch.tensor(1.0)}, ValueError, r"expected x with shape \(..., in\), got \(\)"),
    (
        layer,
        {"weight": zeros(4, 7)},
        ValueError,
        r"weight with shape \(out, 8\) to match x, got \(4, 7\)",
    ),
    (layer, {"weight": zeros(8)}, ValueError, r"weight with shape \(out, 8\) to match x, got \(8,\)"),
    (layer, {"bias": zeros(8)}, ValueError, r"bias with shape \(4,\) to match weight, got \(8,\)"),
    (layer, {"bias": zeros(1)}, ValueError, r"bias with shape \(4,\) to match weight, got \(1,\)"),
    (
        layer,
        {"residual": zeros(2, 5, 8)},
        ValueError,
        r"residual with shape \(2, 5, 4\) to match x and weight, got \(2, 5, 8\)",
    ),
    (layer, {"residual": zeros(4)}, ValueError, r"residual with shape \(2, 5, 4\) .*got \(4,\)"),
    (layer, {"gate": zeros(8)}, ValueError, r"a gate of 1 or out=4 elements, got \(8,\)"),
    (layer, {"gate": zeros(0)}, ValueError, r"a gate of 1 or out=4 elements, got \(0,\)"),
    (layer, {"gate": zeros(4, 1)}, ValueError, r"gate .*got \(4, 1\)"),
    (
        layer,
        {"activation": "tanh"},
        ValueError,
        r"activation to be one of None, gelu, gelu_tanh, relu, squared_relu, silu, got 'tanh'",
    ),
    (layer, {"activation": ["gelu"]}, ValueError, r"activation to be one of .*got \['gelu'\]"),
    *(
        (layer, {name: zeros(*shape, **META)}, ValueError, rf"{name} on cpu with x, got meta; .*\.to\(x\.")
        for name, shape in (("weight", (4, 8)), ("bias", (4,)), ("residual", (2, 5, 4)), ("gate", (1,)))
    ),
    (layer, {"gate": zeros(1, dtype=torch.int64)}, TypeError, r"floating-point gate, got torch.int64"),
    (layer, {"weight": zeros(4, 8, **BF16)}, TypeError, r"weight in torch.float32 like x.*bfloat16; cast"),
    (layer, {"bias": zeros(4, **BF16)}, TypeError, r"bias in torch.float32 like x, got torch.bfloat16; cast"),
    # masks
    (masked, {"mask": LOCATIONS}, TypeError, r"expected a MediaMask, got Tensor; build one with MediaMask\."),
    (masked, {"mask": mask(batch=3)}, ValueError, r"mask with shape \(2, 5\) to match q.*got \(3, 5\)"),
    (masked, {"mask": mask(length=4)}, ValueError, r"mask with shape \(2, 5\) to match q.*got \(2, 4\)"),
    (
        masked,
        {"mask": mask(media=2)},
        ValueError,
        r"mask over media with shape \(2, 3\) to match k.*got \(2, 2\)",
    ),
    (masked, {"mask": mask().to("meta")}, ValueError, r"mask on cpu with q, got meta"),
    # dtypes
    (
        masked,
        {"k": zeros(2, 3, 4, 2, 8, **BF16)},
        TypeError,
        r"k in torch.float32 like q, got torch.bfloat16; cast",
    ),
    (
        masked,
        {"v": zeros(2, 3, 4, 2, 8, **BF16)},
        TypeError,
        r"v in torch.float32 like q, got torch.bfloat16; cast",
    ),
    (masked, {"q": zeros(2, 5, 4, 8, dtype=torch.int32)}, TypeError, r"floating-point q, got torch.int32"),
    (
        perceiver,
        {"k_latents": zeros(2, 3, 2, 8, **BF16)},
        TypeError,
        r"k_latents in torch.float32 .*bfloat16; cast",
    ),
    (perceiver, {"media_lengths": zeros(2)}, TypeError, r"integer media_lengths, got torch.float32"),
    (perceiver, {"media_lengths": zeros(2).bool()}, TypeError, r"integer media_lengths, got torch.bool"),
    # devices
    (
        masked,
        {"k": zeros(2, 3, 4, 2, 8, **META)},
        ValueError,
        r"k on cpu with q, got meta; move it with \.to\(q\.device\)",
    ),
    (perceiver, {"v_latents": zeros(2, 3, 2, 8, **META)}, ValueError, r"v_latents on cpu with q, got meta"),
    (
        perceiver,
        {"media_lengths": zeros(2, **META).long()},
        ValueError,
        r"media_lengths on cpu with q, got meta",
    ),
    # backends
    *(
        (
            call,
            {"backend": "gpu"},
            ValueError,
            r"backend='gpu' is not one of auto, cuda, triton, cpu, reference",
        )
        for call in (masked, perceiver, residual, layer)
    ),
    (layer, {"backend": "gpu"}, ValueError, r"auto, cuda, triton, cpu, reference, mkl, onednn"),
]


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"),
    ERRORS,
    ids=[f"{call.__name__}-{'-'.join(changed)}-{i}" for i, (call, changed, *_) in enumerate(ERRORS)],
)
def test_a_mistake_is_named(call, changed, error, message):
    with pytest.raises(error, match=f"^{OPERATORS[call]}: .*{message}"):
        call(**changed)


@pytest.mark.parametrize("call", OPERATORS, ids=OPERATORS.get)
def test_the_good_call_is_good(call):
    assert not call().any()


def wide_head(**more):
    media = zeros(2, 3, 4, 2, 264)
    return masked(q=zeros(2, 5, 4, 264), k=media, v=media, **more)


def wide_perceiver(**more):
    media, latents = zeros(2, 6, 2, 264), zeros(2, 3, 2, 264)
    keys = {"k_media": media, "v_media": media, "k_latents": latents, "v_latents": latents}
    return perceiver(q=zeros(2, 3, 4, 264), **keys, **more)


def double_residual(**more):
    return residual(**{name: zeros(2, 5, 8).double() for name in ("x", "y")}, **more)


def double_layer(**more):
    shapes = {"x": (2, 5, 8), "weight": (4, 8), "bias": (4,)}
    return layer(**{name: zeros(*shape).double() for name, shape in shapes.items()}, **more)


def double_attention(**more):
    media = zeros(2, 3, 4, 2, 8).double()
    return masked(q=zeros(2, 5, 4, 8).double(), k=media, v=media, **more)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (wide_head, r"head_dim=264 is above 256"),
        (wide_perceiver, r"head_dim=264 is above 256"),
        (double_residual, r"dtype torch.float64 is not one of float32, bfloat16, float16"),
        (double_layer, r"dtype torch.float64 is not one of float32, bfloat16, float16"),
        (double_attention, r"dtype torch.float64 is not one of float32, bfloat16, float16"),
    ],
)
def test_what_cpu_cannot_do_goes_to_the_reference_unless_cpu_was_asked_for(call, reason, compiled):
    with pytest.raises(UnsupportedError, match=rf'backend="cpu" was requested but .*{reason}') as caught:
        call(backend=compiled)
    assert list(caught.value.reasons) == ["cpu"]
    assert not call().any()
