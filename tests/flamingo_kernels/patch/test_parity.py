"""A patched module computes what it computed before: every family, every kind of row, every gradient."""

import copy

import pytest
import torch

from flamingo import modules
from flamingo_kernels import patch, use_backend
from tests.helpers.families import (
    FAMILIES,
    TEXT,
    VISUAL,
    cross_attention,
    media_width,
    perceiver_attention,
    resampler,
)
from tests.helpers.parity import assert_parity

B, T, M, R = 4, 10, 3, 5
LOCATIONS = torch.tensor(
    [
        [0, 0, 1, 0, 1, 1, 0, 0, 1, 0],  # text first, adjacent images, all three seen
        [1, 0, 0, 1, 0, 0, 0, 0, 0, 0],  # an image first, the third image is padding
        [0, 1, 1, 0, 1, 0, 1, 0, 1, 1],  # more <image> tokens than images
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # no image at all
    ]
)
families = pytest.mark.parametrize("family", FAMILIES)
cached_families = pytest.mark.parametrize("family", FAMILIES[:3])
# float64 shows the mathematics, the others the rounding.
dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
    indirect=["backend"],
    ids=str,
)
modes = pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "preceding"])


@pytest.fixture(params=["reference", "cpu"])
def backend(request, running):
    """Others where `dtypes` asks for them: no kernel knows which library its tensors come from."""
    return running(request.param)


@pytest.fixture(autouse=True)
def on_backend(backend):
    with use_backend(backend):
        yield


def patched(module):
    fused = copy.deepcopy(module)
    patch(fused)
    assert type(fused) is not type(module)
    return fused


def tokens(randn):
    return randn(B, T, TEXT)


def not_contiguous(randn):
    return randn(TEXT, T, B).permute(2, 1, 0)


def padded_media(width):
    """Zero images fill up the sequences that have fewer than M."""

    def make(randn):
        media = randn(B, M, R, width)
        media[1, 2] = 0
        media[3] = 0
        return media

    return make


class TestCrossAttention:
    @families
    @modes
    @dtypes
    def test_every_kind_of_row(self, family, immediate, dtype):
        original = cross_attention(family, immediate=immediate).to(dtype)
        locations = LOCATIONS.bool()
        assert_parity(
            original,
            patched(original),
            tokens,
            padded_media(media_width(family)),
            dtype=dtype,
            call=lambda module, x, media: module(x, media, media_locations=locations),
        )

    @families
    @modes
    def test_attention_without_its_block(self, family, immediate):
        original = cross_attention(family, "MaskedCrossAttention", immediate=immediate)
        assert_parity(
            original,
            patched(original),
            tokens,
            padded_media(media_width(family)),
            call=lambda module, x, media: module(x, media, LOCATIONS),
        )

    @families
    @pytest.mark.parametrize("integer", [torch.int64, torch.uint8], ids=str)
    def test_integer_locations(self, family, integer):
        original = cross_attention(family)
        assert_parity(
            original,
            patched(original),
            tokens,
            padded_media(media_width(family)),
            call=lambda module, x, media: module(x, media, LOCATIONS.to(integer)),
        )

    @cached_families
    @modes
    @pytest.mark.parametrize("length", [1, 5])
    @dtypes
    def test_cached_media(self, family, immediate, length, dtype):
        original = cross_attention(family, immediate=immediate).to(dtype)
        assert_parity(
            original,
            patched(original),
            (B, length, TEXT),
            (B, M, R, VISUAL),
            dtype=dtype,
            call=lambda module, x, media: module(x, media, LOCATIONS.bool(), use_cached_media=True),
        )

    @families
    def test_no_locations(self, family):
        original = cross_attention(family)
        # open_flamingo reads the locations unless told that they are cached
        options = {"use_cached_media": True} if family == "open_flamingo" else {}
        assert_parity(
            original,
            patched(original),
            tokens,
            (B, M, R, media_width(family)),
            call=lambda module, x, media: module(x, media, **options),
        )

    @families
    @dtypes
    def test_inputs_that_are_not_contiguous(self, family, dtype):
        original = cross_attention(family).to(dtype)
        width = media_width(family)
        assert_parity(
            original,
            patched(original),
            not_contiguous,
            lambda randn: randn(width, R, M, B).permute(3, 2, 1, 0),
            dtype=dtype,
            call=lambda module, x, media: module(x, media, LOCATIONS),
        )

    @families
    def test_gates_at_zero(self, family):
        original = cross_attention(family)
        with torch.no_grad():
            original.attn_gate.zero_()
            original.ff_gate.zero_()
        fused = patched(original)
        assert_parity(
            original,
            fused,
            tokens,
            (B, M, R, media_width(family)),
            call=lambda module, x, media: module(x, media, LOCATIONS),
        )
        x, media = torch.randn(B, T, TEXT), torch.randn(B, M, R, media_width(family))
        out = fused(x, media, LOCATIONS)
        assert torch.equal(out, x)
        (out * torch.randn_like(out)).sum().backward()
        assert fused.attn_gate.grad != 0
        assert fused.ff_gate.grad != 0
        assert not fused.attn.to_q.weight.grad.any()

    @families
    def test_float32_gates_and_feed_forward_on_bfloat16(self, family):
        original = cross_attention(family)
        original.attn.bfloat16()
        assert_parity(
            original,
            patched(original),
            tokens,
            (B, M, R, media_width(family)),
            dtype=torch.bfloat16,
            call=lambda module, x, media: module(x, media, LOCATIONS),
        )

    @families
    @pytest.mark.parametrize(
        ("weights", "x_dtype"),  # no LayerNorm of a CPU takes weights in bfloat16 for text in float32
        [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
        ids=str,
    )
    def test_autocast(self, family, weights, x_dtype):
        original = cross_attention(family).to(weights)

        def call(module, x, media):
            out = module(x, media, LOCATIONS)
            if torch.is_autocast_enabled("cpu"):
                assert out.dtype == torch.promote_types(weights, x_dtype)  # the gates promote
            return out

        with torch.autocast("cpu", torch.bfloat16):
            assert_parity(
                original,
                patched(original),
                tokens,
                (B, M, R, media_width(family)),
                dtype=x_dtype,
                call=call,
            )


@pytest.mark.parametrize("family", ["open_flamingo", "flamingo_pytorch"])
@pytest.mark.parametrize("kind", ["GatedCrossAttentionBlock", "MaskedCrossAttention"])
def test_batches_that_differ(family, kind):
    """One is broadcast, any other is refused."""
    original = cross_attention(family, kind)
    fused = patched(original)
    x, media = torch.randn(4, T, TEXT), torch.randn(2, M, R, media_width(family))
    torch.testing.assert_close(fused(x, media[:1], LOCATIONS), original(x, media[:1], LOCATIONS))
    with pytest.raises(RuntimeError):
        original(x, media, LOCATIONS)
    with pytest.raises(ValueError, match=r"expected media with B=4 like x, got 2; texts .* a MediaCache"):
        fused(x, media, LOCATIONS)


class OfAnotherClass(modules.PerceiverAttention):
    """Is left alone."""

    def forward(self, *args):
        return super().forward(*args)


class TestResampler:
    @pytest.mark.parametrize("family", FAMILIES[1:])
    @dtypes
    def test_attention(self, family, dtype):
        original = perceiver_attention(family).to(dtype)
        assert_parity(original, patched(original), (B, M, 7, VISUAL), (B, M, R, VISUAL), dtype=dtype)

    @pytest.mark.parametrize("family", FAMILIES[1:])
    @dtypes
    def test_resampler(self, family, dtype):
        original = resampler(family).to(dtype)
        fused = copy.deepcopy(original)
        patch(fused)
        shape = (B, M, 7, VISUAL) if family == "flamingo_pytorch" else (B, M, 2, 7, VISUAL)
        assert_parity(original, fused, shape, dtype=dtype)

    @pytest.mark.parametrize("family", FAMILIES[2:])
    def test_fewer_media_than_positions(self, family):
        original, media = resampler(family), torch.randn(B, M - 1, 2, 7, VISUAL)
        media = media[:, :, 0] if family == "flamingo_pytorch" else media
        torch.testing.assert_close(patched(original)(media), original(media))

    @pytest.mark.parametrize("how", ["fused", "watched", "of another class"])
    def test_clips_of_several_lengths(self, how):
        original = resampler("flamingo")
        if how == "watched":
            original.layers[0][0].to_q.register_forward_hook(lambda *_: None)
        if how == "of another class":
            original.layers[0][0].__class__ = OfAnotherClass
        fused = copy.deepcopy(original)
        patch(fused)
        frames = torch.tensor([[2, 1, 4], [4, 4, 4], [1, 1, 1], [3, 2, 4]])
        assert_parity(
            original, fused, (B, M, 4, 3, VISUAL), call=lambda module, x: module(x, num_frames=frames)
        )


@pytest.mark.parametrize("family", ["open_flamingo", "flamingo_pytorch"])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize(
    "numbers", [[0, 2, 0, 1, 0, 0], [1, 0, 0, 1, 3, 0], [0, -1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0]]
)
def test_locations_that_are_numbers_are_added_up(family, immediate, numbers):
    """The originals count nothing: they add."""
    attn = cross_attention(family, "MaskedCrossAttention", immediate=immediate)
    tensors = torch.randn(1, 6, TEXT), torch.randn(1, 3, 5, media_width(family))
    places = torch.tensor([numbers])
    expected = attn(*tensors, places)
    patch(attn)
    torch.testing.assert_close(attn(*tensors, places), expected)
