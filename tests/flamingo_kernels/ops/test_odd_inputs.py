"""Odd inputs: every backend computes what the reference does, or refuses in the library's own words."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from flamingo_kernels import (
    MediaMask,
    UnsupportedError,
    gated_residual,
    linear,
    masked_cross_attention,
    perceiver_attention,
)
from flamingo_kernels.ops import GatedBlockWeights, gated_block_decode
from flamingo_kernels.sublayers import Linear, Norm, gated_cross_attention, gated_feed_forward


def mask(batch=2, length=5, media=3, policy="zero"):
    locations = torch.arange(batch * length).view(batch, length) % 2
    return MediaMask.last_preceding(locations, media, policy=policy)


def masked_inputs(batch=2, length=5, media=3, heads=4):
    kv = (batch, media, 4, 2, 16)
    return {name: torch.randn(s) for name, s in (("q", (batch, length, heads, 16)), ("k", kv), ("v", kv))}


def perceiver_inputs(clips=2, queries=3, features=5, heads=4):
    media, latents = (clips, features, 2, 16), (clips, 2, 2, 16)
    keys = {"k_media": media, "v_media": media, "k_latents": latents, "v_latents": latents}
    return {name: torch.randn(size) for name, size in {"q": (clips, queries, heads, 16), **keys}.items()}


def residual_inputs(shape, gate=(1,)):
    return {"x": torch.randn(shape), "y": torch.randn(shape), "gate": torch.randn(gate)}


def attention_inputs(batch=2, length=5, width=24, inner=32, media=3):
    kv = (batch, media, 4, 2, 16)
    sizes = {"x": (batch, length, width), "k": kv, "v": kv, "norm": (width,)}
    sizes |= {"to_q": (inner, width), "to_out": (width, inner), "gate": (1,)}
    return {name: torch.randn(size) for name, size in sizes.items()}


def attend(mask, norm, to_q, to_out, **others):
    layers = {"norm": Norm(norm), "to_q": Linear(to_q), "to_out": Linear(to_out)}
    return gated_cross_attention(mask=mask, **layers, **others)


def network_inputs(rows=(2, 5), width=24, inner=40):
    sizes = {"x": (*rows, width), "norm": (width,), "up": (inner, width), "down": (width, inner)}
    return {name: torch.randn(size) for name, size in {**sizes, "gate": (1,)}.items()}


def feed_forward(norm, up, down, **others):
    layers = {"norm": Norm(norm), "up": Linear(up), "down": Linear(down)}
    return gated_feed_forward(**layers, **others)


def strided(tensor):
    """The same numbers, two apart."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def lengths(dtype):
    return partial(perceiver_attention, media_lengths=torch.tensor([3, 100]).to(dtype))


by_columns = MediaMask.from_text_time(torch.tensor([[0, 1], [1, 1], [2, 0], [3, 3], [4, 2]]).t(), 3)
parts = (
    each.t().contiguous().t() for each in (by_columns.lo, by_columns.hi, by_columns.start, by_columns.stop)
)
many = perceiver_inputs(features=300)
empty = {name: strided(tensor) for name, tensor in masked_inputs(batch=0).items()}

COMPUTED = {
    "no sequence": (partial(masked_cross_attention, mask=mask(batch=0)), masked_inputs(batch=0)),
    "no text": (partial(masked_cross_attention, mask=mask(length=0)), masked_inputs(length=0)),
    "no media": (partial(masked_cross_attention, mask=mask(media=0)), masked_inputs(media=0)),
    "no media that count": (
        partial(masked_cross_attention, mask=mask(media=0, policy="open_flamingo")),
        masked_inputs(media=0),
    ),
    "no head": (partial(masked_cross_attention, mask=mask()), masked_inputs(heads=0)),
    "nothing, strided": (partial(masked_cross_attention, mask=mask(batch=0)), empty),
    "a mask of transposed times": (partial(masked_cross_attention, mask=by_columns), masked_inputs()),
    "a mask by columns": (
        partial(masked_cross_attention, mask=MediaMask(*parts, True, "zero")),
        masked_inputs(),
    ),
    **{
        f"scale {scale!r}": (partial(masked_cross_attention, mask=mask(), scale=scale), masked_inputs())
        for scale in (0, -1.5, np.float32(0.5), np.int64(2))
    },
    "no clip": (perceiver_attention, perceiver_inputs(clips=0)),
    "no query": (perceiver_attention, perceiver_inputs(queries=0)),
    "no feature": (perceiver_attention, perceiver_inputs(features=0)),
    "no head of queries": (perceiver_attention, perceiver_inputs(heads=0)),
    **{
        f"lengths in {dtype}": (lengths(dtype), many)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint64, torch.int64)
    },
    "lengths beyond both ends": (
        partial(perceiver_attention, media_lengths=torch.tensor([-3, 1000])),
        many,
    ),
    **{
        f"gated_residual, {shape}, gate {gate}": (gated_residual, residual_inputs(shape, gate))
        for shape, gate in (
            ((3, 0), (1,)),
            ((3, 0), (0,)),
            ((0, 3), (3,)),
            ((2, 0, 4), (4,)),
            ((5,), (5,)),
            ((2, 3), ()),
            ((2, 3), (1, 1, 3)),
        )
    },
    "no row, strided": (gated_residual, {k: strided(v) for k, v in residual_inputs((0, 5)).items()}),
    "a sublayer without sequences": (partial(attend, mask=mask(batch=0)), attention_inputs(batch=0)),
    "a sublayer without text": (partial(attend, mask=mask(length=0)), attention_inputs(length=0)),
    "a sublayer without channels": (partial(attend, mask=mask()), attention_inputs(width=0)),
    "a sublayer without heads": (partial(attend, mask=mask()), attention_inputs(inner=0)),
    "a network of one row": (feed_forward, network_inputs(rows=())),
    "a network without rows": (feed_forward, network_inputs(rows=(0, 3))),
    "a network without channels": (feed_forward, network_inputs(width=0)),
    "a network without a hidden layer": (feed_forward, network_inputs(inner=0)),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_the_reference_computes(name, kernels):
    call, tensors = COMPUTED[name]
    results = []
    for backend in ("reference", kernels):
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
        outputs = call(**leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(out.sum() for out in outputs)
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        results.append([*outputs, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [masked_cross_attention, perceiver_attention])
def test_the_reference_runs_on_meta(call):
    of = {"mask": mask().to("meta")} if call is masked_cross_attention else {}
    tensors = masked_inputs() if of else perceiver_inputs()
    for backend in ("reference", "auto"):
        out = call(**{name: tensor.to("meta") for name, tensor in tensors.items()}, **of, backend=backend)
        assert out.is_meta
        assert out.shape == tensors["q"].shape


def test_subclasses():
    x, y, gate = residual_inputs((3, 4)).values()

    class Named(torch.Tensor):
        """A tensor by another name."""

    expected = gated_residual(x, y, gate)
    assert torch.equal(gated_residual(x.as_subclass(Named), y, gate).as_subclass(torch.Tensor), expected)
    pairs = [TwoTensor(each, each) for each in (x, y, gate)]
    torch.testing.assert_close(gated_residual(*pairs).a, expected)


def test_a_subclass_that_computes_in_its_own_way_is_no_kernels(compiled):
    tensors = residual_inputs((3, 4))
    for name, tensor in tensors.items():
        with pytest.raises(UnsupportedError, match="a tensor is a TwoTensor, which computes in its own way"):
            gated_residual(**tensors | {name: TwoTensor(tensor, tensor)}, backend=compiled)


KINDS = {
    "list": torch.Tensor.tolist,
    "ndarray": torch.Tensor.numpy,
    "NoneType": lambda _: None,
    "float": lambda _: 1.0,
    r"torch\.sparse_coo": torch.Tensor.to_sparse,
    "a nested tensor": lambda tensor: torch.nested.as_nested_tensor([tensor, tensor], layout=torch.jagged),
    r"torch\.complex64": lambda tensor: tensor.to(torch.complex64),
    r"torch\.float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    r"torch\.int64": torch.Tensor.long,
}


def decode_inputs():
    sizes = {"x": (2, 16), "k": (2, 3, 4, 2, 8), "v": (2, 3, 4, 2, 8), "norm": (16,), "to_q": (16, 16)}
    sizes |= {"to_out": (16, 16), "gate": (1,), "ff_norm": (16,), "up": (40, 16), "down": (16, 40)}
    return {name: torch.randn(size) for name, size in {**sizes, "ff_gate": (1,)}.items()}


def decode(x, k, v, backend="auto", eps=1e-5, **weights):
    norms = {name: Norm(weights[name], eps=eps) for name in ("norm", "ff_norm")}
    linears = {name: Linear(weights[name]) for name in ("to_q", "to_out", "up", "down")}
    given = GatedBlockWeights(**{**weights, **norms, **linears})
    return gated_block_decode(x, k, v, mask(length=1), given, backend=backend)


def layer_inputs():
    sizes = {"x": (2, 4), "weight": (3, 4), "bias": (3,), "residual": (2, 3), "gate": (3,)}
    return {name: torch.randn(size) for name, size in sizes.items()}


OPERATORS = (
    "masked_cross_attention",
    "perceiver_attention",
    "gated_residual",
    "linear",
)
OPTIONAL = {
    "gated_block_decode": ("gate", "ff_gate"),
    "gated_cross_attention": ("gate",),
    "gated_feed_forward": ("gate",),
    "linear": ("bias", "residual", "gate"),
}
CALLS = {
    "masked_cross_attention": (partial(masked_cross_attention, mask=mask()), masked_inputs()),
    "perceiver_attention": (perceiver_attention, perceiver_inputs()),
    "gated_residual": (gated_residual, residual_inputs((2, 4))),
    "gated_block_decode": (decode, decode_inputs()),
    "linear": (linear, layer_inputs()),
    "gated_cross_attention": (partial(attend, mask=mask()), attention_inputs()),
    "gated_feed_forward": (feed_forward, network_inputs()),
}


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, (_, given) in CALLS.items() for name in given]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_tensor_of_numbers_is_refused(operator, name, kind):
    call, tensors = CALLS[operator]
    call(**tensors)
    given = KINDS[kind](tensors[name])
    if given is None and name in OPTIONAL.get(operator, ()):
        pytest.skip("it may be missing")
    with pytest.raises(TypeError, match=f"^{operator}: expected .*{name}.*, got {kind}"):
        call(**{**tensors, name: given})


@pytest.mark.parametrize(
    ("operator", "option", "value", "message"),
    [
        *(
            (operator, "scale", value, message)
            for operator in ("masked_cross_attention", "perceiver_attention", "gated_cross_attention")
            for value, message in (
                (torch.nan, "a finite number, got nan"),
                (torch.inf, "a finite number, got inf"),
                ("2", "a number, got str"),
                (True, "a number, got bool"),
                (torch.tensor(1.0), "a number, got Tensor"),
            )
        ),
        ("gated_block_decode", "eps", -1e-5, "a finite number of at least 0, got -1e-05"),
        ("gated_block_decode", "eps", "1e-5", "a number, got str"),
        ("gated_block_decode", "eps", None, "a number, got NoneType"),
        ("gated_feed_forward", "activation", ["gelu"], r"to be one of gelu.* got \['gelu'\]"),
        ("gated_feed_forward", "gate_proj", torch.zeros(40, 24), "gate_proj to be a Linear, got Tensor"),
        ("gated_cross_attention", "q_norm", torch.zeros(16), "q_norm to be a Norm, got Tensor"),
        ("gated_cross_attention", "q_norm", Norm(torch.zeros(15)), r"q_norm\.weight with shape \(16,\)"),
        ("gated_cross_attention", "mask", [[1]], "expected a MediaMask, got list; build one"),
        ("perceiver_attention", "media_lengths", [3, 4], "media_lengths to be a torch.Tensor, got list"),
        (
            "perceiver_attention",
            "media_lengths",
            torch.ones(2).to(torch.complex64),
            "integer media_lengths, got torch.complex64",
        ),
        *((operator, "backend", None, "backend=None is not one of auto") for operator in OPERATORS),
    ],
)
def test_options_that_cannot_be_meant(operator, option, value, message):
    call, tensors = CALLS[operator]
    with pytest.raises((TypeError, ValueError), match=f"^{operator}: .*{message}"):
        call(**{**tensors, option: value})


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_head_of_no_dimension(scale):
    given = {key: tensor[..., :0] for key, tensor in masked_inputs().items()}
    with pytest.raises(
        ValueError, match=r"^masked_cross_attention: expected a head_dim of at least 1, got 0"
    ):
        masked_cross_attention(**given, mask=mask(), scale=scale)
