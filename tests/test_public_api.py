"""`__all__` is the contract: its names, their signatures, and what their documentation must say."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import flamingo
import flamingo.training
import flamingo_kernels
from flamingo_kernels import MediaMask

OPERATORS = {
    "masked_cross_attention": "(q, k, v, mask, *, scale=None, backend='auto')",
    "perceiver_attention": (
        "(q, k_media, v_media, k_latents, v_latents, *, media_lengths=None, scale=None, backend='auto')"
    ),
    "gated_residual": "(x, y, gate, *, backend='auto')",
    "gated_block_decode": ("(x, k, v, mask, weights, *, scale=None, backend='auto')"),
    "linear": (
        "(x, weight, bias=None, *, weight_scale=None, activation=None, residual=None, gate=None, "
        "backend='auto')"
    ),
}
MASKS = {
    "last_preceding": "(media_locations, num_media, *, policy='zero')",
    "all_preceding": "(media_locations, num_media, *, policy='zero')",
    "cached": "(media_locations, num_media, length, *, immediate=True, policy='zero')",
    "from_text_time": "(text_time, num_media, *, immediate=True, policy='zero')",
}


def signature(function) -> str:
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_names():
    assert set(flamingo_kernels.__all__) == {
        "FoldReport",
        "GatedBlockWeights",
        "GatedCrossAttentionBlock",
        "Linear",
        "MaskedCrossAttention",
        "MediaCache",
        "MediaMask",
        "Norm",
        "PatchReport",
        "PerceiverAttention",
        "PerceiverResampler",
        "UnsupportedError",
        "available_backends",
        "fold",
        "gated_block_decode",
        "gated_residual",
        "linear",
        "masked_cross_attention",
        "patch",
        "perceiver_attention",
        "quantize",
        "QuantizeReport",
        "unfold",
        "unquantize",
        "unpatch",
        "use_backend",
    }


@pytest.mark.parametrize(
    "package", [flamingo, flamingo.training, flamingo_kernels], ids=lambda package: package.__name__
)
def test_every_public_name_exists_and_is_documented(package):
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert inspect.getdoc(getattr(package, name)), name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    operator = getattr(flamingo_kernels, name)
    assert signature(operator) == OPERATORS[name]
    text = inspect.getdoc(operator)
    sections = ("Args:", "Returns:", "Raises:", "Limits:", "Source:", "Example:")
    places = [text.find(f"\n{section}") for section in sections]
    assert min(places) > 0
    assert places == sorted(places)
    for parameter in inspect.signature(operator).parameters:
        assert f"\n    {parameter}: " in text
    for fact in ("deterministic", "2204.14198", ">>> "):
        assert fact in text


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    assert signature(getattr(MediaMask, name)) == MASKS[name]


def test_type_checkers_are_told():
    for package in (flamingo, flamingo_kernels):
        assert (Path(package.__file__).parent / "py.typed").exists()
