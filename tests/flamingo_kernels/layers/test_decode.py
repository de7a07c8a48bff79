"""A patched block decodes by one operator where the CUDA kernels run, and elsewhere as before."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from flamingo import modules
from flamingo_kernels import MediaCache, MediaMask, fold, patch, use_backend
from flamingo_kernels.layers import cross_attention, decode
from flamingo_kernels.sublayers import arguments
from flamingo_kernels.testing import DTYPES
from tests.helpers.parity import hold
from tests.helpers.weights import randomise

SIZES = {"dim": 24, "dim_visual": 12, "dim_head": 8, "heads": 3}
LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()


@pytest.fixture
def cuda(cuda):
    with use_backend(cuda):
        yield


@pytest.fixture
def steps(monkeypatch):
    """The shapes of x of all calls of the operator by layers."""
    met = []
    operator = decode.gated_block_decode

    def record(x, *arguments, **options):
        met.append(tuple(x.shape))
        return operator(x, *arguments, **options)

    monkeypatch.setattr(decode, "gated_block_decode", record)
    return met


def block(dtype=torch.float32, **options):
    return randomise(modules.GatedCrossAttentionBlock(**SIZES, **options)).to(dtype)


def inputs(dtype=torch.float32, length=1, batch=2):
    generator = torch.Generator().manual_seed(0)
    x, media = (
        torch.randn(batch, length, 24, generator=generator),
        torch.randn(2, 2, 5, 12, generator=generator),
    )
    return x.to(dtype), media.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cached", [False, True], ids=["media", "MediaCache"])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "squared_relu", "policy": "open_flamingo"}, {"only_attend_immediate_media": False}],
    ids=str,
)
@torch.no_grad()
def test_a_step_is_within_the_budget(options, cached, dtype, cuda, steps):
    reference = block(dtype, **options)
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs(dtype)
    exact = copy.deepcopy(reference).double()(x.double(), media.double(), LOCATIONS, True)
    given = MediaCache(fused, media) if cached else media
    plain = partial(reference, x, media, LOCATIONS, True)
    found = hold("out", fused(x, given, LOCATIONS, True), plain, exact)
    assert steps == [(2, 24)]
    assert found.passed, str(found)


@torch.no_grad()
def test_without_the_kernels_a_step_is_as_before(steps):
    fused = block()
    patch(fused)
    x, media = inputs()
    fused(x, media, LOCATIONS, True)
    with use_backend("reference"):
        fused(x, media, LOCATIONS, True)
    assert steps == []


@torch.no_grad()
def test_a_folded_block_decodes_too(cuda, steps):
    """Its gates are infinite, its norms without effect."""
    reference = block(norm_media=True).eval()
    (
        reference.attn.norm.bias.zero_(),
        reference.ff[0].bias.zero_(),
    )  # where they are not, linear layers get a bias
    fused = copy.deepcopy(reference)
    patch(fused)
    fold(fused)
    x, media = inputs()
    found = fused(x, media, LOCATIONS, True)
    assert steps == [(2, 24)]
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=1e-4, atol=1e-5)


def change(how):
    fused = block()
    if how == "a bias":
        fused.ff[1] = torch.nn.Linear(24, 96)
    if how == "another eps":
        fused.ff[0].eps = 1e-3
    if how == "a hook":
        fused.ff[3].register_forward_hook(lambda module, inputs, output: output * 2)
    if how == "strided weights":
        fused.attn.to_out.weight.data = fused.attn.to_out.weight.data.T.contiguous().T
    if how == "another activation":
        fused.ff[2] = torch.nn.SiLU()
    if how == "a gate in another dtype":
        fused.ff_gate.data = fused.ff_gate.data.double()
    return fused


@pytest.mark.parametrize(
    "how",
    ["a bias", "another eps", "a hook", "strided weights", "another activation", "a gate in another dtype"],
)
@torch.no_grad()
def test_what_the_operator_does_not_compute_is_computed_as_before(how, cuda, steps):
    reference = change(how)
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    with use_backend("reference") if "dtype" in how else use_backend("cuda"):
        found = fused(x, media, LOCATIONS, True)
    assert steps == []
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", ["nothing", "an RMS norm", "another RMS norm", "a norm of queries", "a gated unit"]
)
@torch.no_grad()
def test_what_a_step_of_the_operator_lacks(how, cuda, steps):
    """No block of ours has these, but one of another library might."""
    fused = block()
    patch(fused)
    x, media = inputs()
    attn = arguments.as_cross_attention(x, fused.attn.norm, fused.attn.to_q, fused.attn.to_out)
    ff = arguments.as_feed_forward(x, *fused.ff)
    if how == "an RMS norm":
        attn = attn._replace(norm=attn.norm._replace(rms=True))
    if how == "another RMS norm":
        ff = ff._replace(norm=ff.norm._replace(rms=True))
    if how == "a norm of queries":
        attn = attn._replace(q_norm=attn.norm)
    if how == "a gated unit":
        ff = ff._replace(gate_proj=ff.up)
    mask = MediaMask.cached(LOCATIONS, 2, 1)
    k, v = fused.attn.media_source()(media)
    out = decode.decode(x, k, v, mask, attn, ff, (fused.attn_gate, fused.ff_gate), fused.attn.scale)
    assert (out is not None) == (how == "nothing") == bool(steps)


@torch.no_grad()
def test_a_refused_step_gathers_its_inputs_once(cuda, steps, monkeypatch):
    """The sublayers take the projected media, the mask and the plain modules that the operator refused."""
    fused = change("another eps")
    patch(fused)
    x, media = inputs()
    calls = []

    def count(home, name):
        function = getattr(home, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(home, name, call)

    count(cross_attention, "load_or_project")
    count(cross_attention, "media_mask")
    count(cross_attention.arguments, "as_cross_attention")
    count(cross_attention, "decode")
    fused(x, media, LOCATIONS, True)
    assert steps == []
    assert sorted(calls) == ["as_cross_attention", "decode", "load_or_project", "media_mask"]


def test_calls_that_are_no_step(cuda, steps):
    """More than one token, a gradient, autocast, and texts that share media."""
    fused = block()
    patch(fused)
    x, media = inputs()
    fused(x, media, LOCATIONS, True)
    cache = MediaCache(fused, media)
    with torch.no_grad():
        fused(inputs(length=6)[0], media, LOCATIONS)
        fused(inputs(batch=4)[0], MediaCache(fused, media), LOCATIONS.repeat(2, 1), True)
        with torch.autocast("cpu", torch.bfloat16):
            fused(x, media, LOCATIONS, True)
            fused(x, cache, LOCATIONS, True)
        assert steps == []
        fused(x, media, LOCATIONS, True)
    assert steps == [(2, 24)]


@torch.no_grad()
def test_a_step_compiles_in_one_piece(cuda, steps):
    fused = block()
    patch(fused)
    x, media = inputs()
    cache = MediaCache(fused, media)
    expected = fused(x, cache, LOCATIONS, True)
    compiled = torch.compile(lambda x: fused(x, cache, LOCATIONS, True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert steps[1:]
