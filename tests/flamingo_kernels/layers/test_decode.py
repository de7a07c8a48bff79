"""A patched block decodes by one operator where its kernels run, and elsewhere as before."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from flamingo import modules
from flamingo_kernels import MediaCache, fold, patch, quantize, use_backend
from flamingo_kernels.layers import cross_attention, decode
from flamingo_kernels.testing import DTYPES
from tests.helpers.parity import hold
from tests.helpers.weights import randomise

SIZES = {"dim": 24, "dim_visual": 12, "dim_head": 8, "heads": 3}
LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()


@pytest.fixture(params=["cpu", "triton", "cuda"])
def backend(request, running):
    with use_backend(running(request.param)):
        yield request.param


@pytest.fixture
def cpu(running):
    with use_backend(running("cpu")):
        yield


@pytest.fixture
def steps(monkeypatch):
    """The shapes of x of all calls of the operator by layers."""
    met = []
    operator = decode.api.run

    def record(backend, x, *arguments):
        met.append(tuple(x.shape))
        return operator(backend, x, *arguments)

    monkeypatch.setattr(decode.api, "run", record)
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
def test_a_step_is_within_the_budget(options, cached, dtype, backend, steps):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@torch.no_grad()
def test_a_step_under_autocast_is_within_the_budget(dtype, backend, steps):
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    exact = copy.deepcopy(reference).double()(x.double(), media.double(), LOCATIONS, True)

    def plain():
        with torch.autocast("cpu", dtype):
            return reference(x, media, LOCATIONS, True)

    with torch.autocast("cpu", dtype):
        outs = [fused(x, media, LOCATIONS, True) for _ in range(2)]
    found = hold("out", outs[1], plain, exact)
    assert steps == [(2, 24)] * 2
    assert torch.equal(*outs)
    assert outs[0].dtype == torch.float32
    assert found.passed, str(found)


@torch.no_grad()
def test_copies_for_autocast_last_from_the_first_token_to_the_next_text(cpu):
    fused = block()
    patch(fused)
    x, media = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        fused(x, media, LOCATIONS, True)
        copies = decode.STEPS[fused]._tensors
        assert {each.dtype for each in copies if each.ndim == 2} == {torch.bfloat16}
        fused(x, media, LOCATIONS, True)
        assert all(before is now for before, now in zip(copies, decode.STEPS[fused]._tensors, strict=True))
        freed = weakref.ref(decode.STEPS[fused])
        del copies
        fused(inputs(length=6)[0], media, LOCATIONS)
        assert freed() is None
        fused(x, media, LOCATIONS, True)
    assert decode.STEPS[fused]._originals
    fused(x, media, LOCATIONS, True)
    assert not decode.STEPS[fused]._originals
    with torch.autocast("cpu", torch.bfloat16):
        fused(x, media, LOCATIONS, True)
    assert decode.STEPS[fused]._originals


@torch.no_grad()
def test_without_the_kernels_a_step_is_as_before(steps):
    fused = block()
    patch(fused)
    x, media = inputs()
    with use_backend("reference"):
        fused(x, media, LOCATIONS, True)
    assert steps == []


@torch.no_grad()
def test_a_folded_block_decodes_too(backend, steps):
    """It has no gates, and its linear layers have biases."""
    reference = block(norm_media=True).eval()
    fused = copy.deepcopy(reference)
    patch(fused)
    fold(fused)
    x, media = inputs()
    found = fused(x, media, LOCATIONS, True)
    assert steps == [(2, 24)]
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_weights_of_integers_decode_too(keep, autocast, backend, steps):
    fused = block().eval()
    patch(fused)
    x, media = inputs()
    exact = fused(x, media, LOCATIONS, True)
    quantize(fused, keep=keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = fused(x, media, LOCATIONS, True)
    assert len(steps) == 2
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_texts_that_share_media_decode_too(backend, steps):
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs(batch=6)
    locations = LOCATIONS.repeat_interleave(3, 0)
    found = fused(x, MediaCache(fused, media), locations, True)
    assert steps == [(6, 24)]
    expected = reference(x, media.repeat_interleave(3, 0), locations, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def a_hook(block):
    block.ff[3].register_forward_hook(lambda module, inputs, output: output * 2)


def a_hook_on_a_norm(block):
    block.attn.norm.register_forward_hook(lambda module, inputs, output: output * 2)


def an_activation_that_nobody_knows(block):
    block.ff[2] = nn.Softsign()


def strided_weights(block):
    block.attn.to_out.weight.data = block.attn.to_out.weight.data.T.contiguous().T


def a_gate_in_another_dtype(block):
    block.ff_gate.data = block.ff_gate.data.double()


def weights_in_another_dtype(block):
    block.ff[1].to(torch.float64)


def a_layer_in_front(block):
    block.attn.to_q = nn.Sequential(nn.Linear(24, 24), block.attn.to_q)


UNKNOWN = [
    a_hook,
    a_hook_on_a_norm,
    an_activation_that_nobody_knows,
    strided_weights,
    a_gate_in_another_dtype,
    a_layer_in_front,
]


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("change", UNKNOWN, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_the_operator_does_not_compute_is_computed_as_before(change, when, cpu, steps):
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    if when == "after it":
        fused(x, media, LOCATIONS, True)
    steps.clear()
    torch.manual_seed(0), change(fused)
    torch.manual_seed(0), change(reference)
    context = use_backend("reference") if change is a_gate_in_another_dtype else use_backend("cpu")
    with context:
        found = fused(x, media, LOCATIONS, True)
    assert steps == []
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [a_hook, a_hook_on_a_norm], ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_hook_is_called_in_a_layer_that_repeats_no_bug(change, cpu, steps):
    """Such a layer does not leave the call to the original's forward."""
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    fused.fixes = fused.attn.fixes = frozenset({"a bug"})
    x, media = inputs()
    fused(x, media, LOCATIONS, True)
    for each in (fused, reference):
        change(each)
    found = fused(x, media, LOCATIONS, True)
    assert len(steps) == 1
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=1e-4, atol=1e-5)


def numbers(block):
    block.attn.to_q.weight.mul_(2)


def numbers_behind_torch(block):
    block.ff[1].weight.data.mul_(2)


def other_memory(block):
    block.ff[1].weight.data = block.ff[1].weight.data * 2


def another_parameter(block):
    block.ff[1].weight = nn.Parameter(block.ff[1].weight * 2)


def another_module(block):
    block.ff[3] = nn.Linear(96, 24)


def another_norm(block):
    block.ff[0] = nn.LayerNorm(24, eps=0.1)


def another_eps(block):
    block.attn.norm.eps = 0.5


def another_approximation(block):
    block.ff[2].approximate = "tanh"


def a_bias(block):
    block.ff[1] = nn.Linear(24, 96)


def another_activation(block):
    block.ff[2] = nn.SiLU()


def another_gate(block):
    block.attn_gate = nn.Parameter(torch.tensor([0.3]))


def a_gate_of_each_channel(block):
    block.ff_gate = nn.Parameter(torch.linspace(-1, 1, 24))


CHANGES = [
    *(numbers, numbers_behind_torch, other_memory, another_parameter, another_module, another_norm),
    *(another_eps, another_approximation, a_bias, another_activation, another_gate, a_gate_of_each_channel),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_change_between_two_steps_is_seen(change, autocast, cpu, steps):
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = fused(x, media, LOCATIONS, True)
        for each in (fused, reference):
            torch.manual_seed(0), change(each)
        found = fused(x, media, LOCATIONS, True)
        again = copy.deepcopy(fused)(x, media, LOCATIONS, True)
    assert len(steps) == 3
    assert not torch.equal(found, before)
    assert torch.equal(found, again)
    margin = 0.05 if autocast else 1e-5
    torch.testing.assert_close(found, reference(x, media, LOCATIONS, True), rtol=10 * margin, atol=margin)


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_a_change_of_quantized_weights_is_seen(keep, cpu, steps):
    fused = block().eval()
    patch(fused)
    quantize(fused, keep=keep)
    x, media = inputs()
    before = fused(x, media, LOCATIONS, True)
    weight = fused.ff[3].weight
    weight.copy_(-weight)
    changed = fused(x, media, LOCATIONS, True)
    assert len(steps) == 2
    again = copy.deepcopy(fused)
    torch.testing.assert_close(changed, again(x, media, LOCATIONS, True), rtol=0, atol=0)
    assert not torch.allclose(changed, before)


@torch.no_grad()
def test_quantizing_frees_what_a_step_kept(cpu):
    fused = block().eval()
    patch(fused)
    x, media = inputs()
    fused(x, media, LOCATIONS, True)
    original = weakref.ref(fused.ff[1].weight)
    quantize(fused, keep=False)
    gc.collect()
    assert original() is None


@torch.no_grad()
def test_an_unchanged_block_is_looked_at_once(cpu, monkeypatch):
    made = []
    make = decode._make
    monkeypatch.setattr(decode, "_make", lambda *given: made.append(given) or make(*given))
    fused = block()
    patch(fused)
    x, media = inputs()
    for _ in range(3):
        fused(x, media, LOCATIONS, True)
    assert len(made) == 1
    gone = len(decode.STEPS)
    del fused, made[:]
    assert len(decode.STEPS) < gone  # what was kept goes with its block


def test_calls_that_are_no_step(cpu, steps):
    """More than one token, a gradient, and keys in another dtype than that of autocast."""
    fused = block()
    patch(fused)
    x, media = inputs()
    fused(x, media, LOCATIONS, True)
    cache = MediaCache(fused, media)
    with torch.no_grad():
        fused(inputs(length=6)[0], media, LOCATIONS)
        with torch.autocast("cpu", torch.bfloat16):
            fused(x, cache, LOCATIONS, True)
        assert steps == []
        fused(x, media, LOCATIONS, True)
    assert steps == [(2, 24)]


@torch.no_grad()
def test_more_rows_than_pay_on_a_processor(cpu, steps):
    reference = block()
    fused = copy.deepcopy(reference)
    patch(fused)
    x, media = torch.randn(18, 1, 24), torch.randn(18, 2, 5, 12)
    locations = LOCATIONS.repeat(9, 1)
    for rows in (16, 18):
        given = x[:rows], media[:rows], locations[:rows], True
        torch.testing.assert_close(fused(*given), reference(*given), rtol=1e-4, atol=1e-5)
    assert steps == [(16, 24)]
    quantize(fused)
    fused(x, media, locations, True)
    assert steps[1:] == [(18, 24)]


@torch.no_grad()
def test_a_step_compiles_in_one_piece(cuda, steps):
    with use_backend(cuda):
        fused = block()
        patch(fused)
        x, media = inputs()
        cache = MediaCache(fused, media)
        expected = fused(x, cache, LOCATIONS, True)
        run = partial(fused, media=cache, media_locations=LOCATIONS, use_cached_media=True)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert steps[1:]


@torch.no_grad()
def test_keys_in_another_dtype_are_left_to_the_sublayers(cpu, steps):
    fused = block()
    patch(fused)
    x, _ = inputs()
    step = decode.step_of(fused, parts_of(fused), x)
    k, v = torch.randn(2, 2, 2, 5, 3, 8, dtype=torch.bfloat16)
    mask = cross_attention.MediaMask.cached(LOCATIONS, 2, 1)
    assert step.run(x, k, v, mask, 1.0) is None
    assert step.run(x, k.float()[:0], v.float()[:0], mask, 1.0) is None
    assert steps == []


def parts_of(block):
    ff_norm, up, activation, down = block.ff
    attn = block.attn
    return decode.Parts(
        attn.norm, attn.to_q, attn.to_out, ff_norm, up, activation, down, block.attn_gate, block.ff_gate
    )
