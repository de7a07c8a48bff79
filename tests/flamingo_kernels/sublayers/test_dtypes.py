"""In which dtypes the sublayers compute, their own or that of autocast, and which they refuse by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flamingo.modules import dense_masked_attention, text_time
from flamingo_kernels import MediaMask
from flamingo_kernels.sublayers import Linear, Norm, gated_cross_attention, gated_feed_forward, norm
from flamingo_kernels.testing import assert_all_passed
from tests.helpers.parity import measure

D, H, HEAD, INNER = 24, 3, 8, 40
LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]])
MASK = MediaMask.last_preceding(LOCATIONS, num_media=2)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def linear(out, into):
    return Linear(randn(out, into) / into**0.5, randn(out))


def attention():
    k, v = randn(2, 2, 2, 5, H, HEAD)
    tensors = {"x": randn(2, 7, D), "k": k, "v": v, "norm": Norm(randn(D), randn(D, seed=1))}
    tensors |= {"to_q": linear(H * HEAD, D), "to_out": linear(D, H * HEAD), "gate": randn(1)}
    return gated_cross_attention, {**tensors, "q_norm": Norm(randn(HEAD), randn(HEAD, seed=1))}


def feed_forward():
    tensors = {"x": randn(2, 7, D), "norm": Norm(randn(D), randn(D, seed=1)), "gate": randn(D)}
    layers = {"up": linear(INNER, D), "gate_proj": linear(INNER, D), "down": linear(D, INNER)}
    return gated_feed_forward, {**tensors, **layers}


SUBLAYERS = pytest.mark.parametrize("make", [attention, feed_forward])


def cast(tensors, change):
    """Every tensor as `change(name, tensor)` makes it; the name of a weight is `to_q.weight`."""

    def of(name, value):
        if not isinstance(value, (Linear, Norm)):
            return change(name, value)
        fields = {f: t for f, t in value._asdict().items() if isinstance(t, torch.Tensor)}
        return value._replace(**{f: change(f"{name}.{f}", t) for f, t in fields.items()})

    return {name: of(name, value) for name, value in tensors.items()}


def leaves(tensors):
    found = {}
    cast(tensors, lambda name, tensor: found.setdefault(name, tensor))
    return found


def call(sublayer, tensors, **options):
    rest = dict(tensors)
    first = [rest.pop(name) for name in ("x", "k", "v") if name in rest]
    return sublayer(*first, *([MASK] if len(first) == 3 else []), **rest, **options)


MULTIPLIED = {
    attention: ["k", "v", "to_q.weight", "to_q.bias", "to_out.weight", "to_out.bias"],
    feed_forward: ["up.weight", "up.bias", "gate_proj.weight", "down.weight", "down.bias"],
}


@pytest.mark.parametrize(
    ("make", "odd"), [(make, odd) for make, names in MULTIPLIED.items() for odd in names]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_is_multiplied_in_another_dtype_is_named(make, odd, dtype, backend):
    sublayer, tensors = make()
    mixed = cast(tensors, lambda name, tensor: tensor.to(dtype) if name == odd else tensor)
    message = rf"{sublayer.__name__}: expected {odd} in torch.float32 like x, got {dtype}; cast it"
    with pytest.raises(TypeError, match=message):
        call(sublayer, mixed, backend=backend)


@pytest.mark.parametrize("bias", [torch.full((D,), 2.0**-12), None], ids=["biased", "unbiased"])
def test_a_norm_wider_than_the_text_is_not_rounded(bias):
    x, weight = randn(7, D).bfloat16(), 1 + randn(D) / 1000
    n, _ = norm.forward(x, Norm(weight, bias))
    torch.testing.assert_close(n, F.layer_norm(x.float(), (D,), weight, bias))


def test_the_length_of_a_row_may_be_beyond_its_dtype():
    x = torch.full((3, 256), 6000.0, dtype=torch.float16)
    n, statistics = norm.forward(x, Norm(torch.ones(256).half(), rms=True))
    torch.testing.assert_close(n, torch.ones_like(x))
    torch.testing.assert_close(statistics.rstd, torch.full((3, 1), 1 / 6000))


@SUBLAYERS
@pytest.mark.parametrize("odd", ["x", "gate", "norm.weight", "norm.bias", "q_norm.weight"])
def test_integers_are_refused(make, odd, backend):
    sublayer, tensors = make()
    if odd not in leaves(tensors):
        pytest.skip("it has none")
    mixed = cast(tensors, lambda name, tensor: tensor.int() if name == odd else tensor)
    with pytest.raises(TypeError, match=f"expected a floating-point {odd}, got torch.int32"):
        call(sublayer, mixed, backend=backend)


@SUBLAYERS
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("gate", "a gate of 1 or D=24"),
        ("norm.weight", r"norm.weight with shape \(24,\)"),
        ("q_norm.weight", r"q_norm.weight with shape \(8,\)"),
        ("to_q.weight", r"to_q.bias with shape \(23,\) to match to_q.weight"),
        ("to_out.weight", r"to_out.weight with shape \(24, 24\)"),
        ("to_q.bias", r"to_q.bias with shape \(24,\)"),
        ("up.bias", r"up.bias with shape \(40,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, odd, message, backend):
    sublayer, tensors = make()
    if odd not in leaves(tensors):
        pytest.skip("it has none")
    mixed = cast(tensors, lambda name, tensor: tensor.repeat(23)[:23] if name == odd == "gate" else tensor)
    mixed = cast(mixed, lambda name, tensor: tensor[:-1] if name == odd != "gate" else tensor)
    with pytest.raises(ValueError, match=message):
        call(sublayer, mixed, backend=backend)


# What a model holds in which dtype, by name.
MIXTURES = {
    "all in float32": lambda name: torch.float32,
    "weights in bfloat16": lambda name: torch.float32 if name == "x" else torch.bfloat16,
    "text in bfloat16": lambda name: torch.bfloat16 if name == "x" else torch.float32,
    "keys in float32": lambda name: torch.float32 if name == "k" else torch.bfloat16,
    "norms and gates in float32": lambda name: (
        torch.float32 if "norm" in name or name == "gate" else torch.bfloat16
    ),
}


@SUBLAYERS
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(make, mixture, inside, dtype, kernels):
    """By the error budget, against what one writes without the sublayer under the same autocast."""
    sublayer, tensors = make()
    tensors = cast(tensors, lambda name, x: x.to(mixture(name)))
    kernel = gradients(partial(call, sublayer, backend=kernels), tensors, dtype, inside)
    exact = gradients(EAGER[make], cast(tensors, lambda name, x: x.double()), None, inside)
    assert_all_passed(
        measure(kernel, lambda: gradients(EAGER[make], tensors, dtype, inside), exact), "autocast"
    )


def gradients(run, tensors, dtype, inside):
    """What `run` makes of the tensors under autocast, if there is a dtype for it, and all gradients."""
    tensors = cast(tensors, lambda name, tensor: tensor.detach().requires_grad_())
    named = leaves(tensors)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        z = run(tensors)
        dz = randn(*z.shape, seed=7).to(z.dtype)
        with torch.autocast("cpu", dtype, enabled=inside and dtype is not None):
            grads = torch.autograd.grad(z, list(named.values()), dz)
    return {"z": z.detach(), **dict(zip(named, grads, strict=True))}


def normed(x, norm):
    """With parameters as wide as x, as no LayerNorm of a CPU takes narrower ones."""
    weight, bias = (each.to(torch.promote_types(x.dtype, each.dtype)) for each in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def eager_attention(t):
    q = F.linear(normed(t["x"], t["norm"]), *t["to_q"][:2]).unflatten(-1, (H, HEAD))
    times = text_time(LOCATIONS)
    out = dense_masked_attention(normed(q, t["q_norm"]), t["k"], t["v"], times)
    return t["x"] + t["gate"].tanh() * F.linear(out.flatten(2), *t["to_out"][:2])


def eager_feed_forward(t):
    n = normed(t["x"], t["norm"])
    h = F.gelu(F.linear(n, *t["gate_proj"][:2])) * F.linear(n, *t["up"][:2])
    return t["x"] + t["gate"].tanh() * F.linear(h, *t["down"][:2])


EAGER = {attention: eager_attention, feed_forward: eager_feed_forward}


@SUBLAYERS
def test_a_backward_pass_under_autocast_that_was_none_forward(make, kernels):
    """It multiplies in the dtypes of the forward pass; in others its kernels would misread memory."""
    sublayer, tensors = make()
    tensors = cast(tensors, lambda name, tensor: tensor.requires_grad_())
    wanted = list(leaves(tensors).values())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            z = call(sublayer, tensors, backend=kernels)
        grads = torch.autograd.grad(z, wanted, torch.ones_like(z), retain_graph=True)
    expected = torch.autograd.grad(z, wanted, torch.ones_like(z))
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_under_autocast(dtype):
    """As one graph, with the gradients of the same call without a compiler."""
    x, scale = torch.randn(2, 3, 16, requires_grad=True), torch.ones(16)
    up, down, gate = torch.randn(32, 16), torch.randn(16, 32), torch.ones(1)

    def call(x):
        layers = {"up": Linear(up), "down": Linear(down)}
        return gated_feed_forward(x, norm=Norm(scale, torch.zeros(16)), **layers, gate=gate)

    results = []
    for run in (call, torch.compile(call, backend="eager", fullgraph=True)):
        with torch.autocast("cpu", dtype):
            out = run(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)
