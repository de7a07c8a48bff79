"""In which dtypes the sublayers compute: those of their tensors, or of autocast; what does not fit is named."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels import MediaMask
from flamingo_kernels.sublayers import Linear, Norm, gated_cross_attention, gated_feed_forward
from tests.parity import measure

D, H, HEAD, INNER = 24, 3, 8, 40
MASK = MediaMask.last_preceding(torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]]), num_media=2)


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
    layers = {"hidden": linear(INNER, D), "factor": linear(INNER, D), "output": linear(D, INNER)}
    return gated_feed_forward, {**tensors, **layers}


SUBLAYERS = pytest.mark.parametrize("make", [attention, feed_forward])


def cast(tensors, change):
    """Every tensor as `change(name, tensor)` makes it; those of a Linear or a Norm are called `name.field`."""

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
    feed_forward: ["hidden.weight", "hidden.bias", "factor.weight", "output.weight", "output.bias"],
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
        ("to_q.weight", r"to_q.weight with shape \(16, 24\)"),
        ("to_out.weight", r"to_out.weight with shape \(24, 24\)"),
        ("to_q.bias", r"to_q.bias with shape \(24,\)"),
        ("hidden.bias", r"hidden.bias with shape \(40,\)"),
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
    """By the error budget, against the sublayer operation by operation under the same autocast."""
    sublayer, tensors = make()
    tensors = cast(tensors, lambda name, tensor: tensor.to(mixture(name)))
    if tensors["x"].dtype == torch.float32 and tensors["norm"].weight.dtype == torch.bfloat16:
        # A LayerNorm of torch takes no such weights: the exact ones stand in for it.
        eager_tensors = cast(tensors, lambda name, tensor: tensor.float() if "norm" in name else tensor)
    else:
        eager_tensors = tensors
    results = []
    for backend, given, autocast in (
        (kernels, tensors, True),
        ("reference", eager_tensors, True),
        ("reference", cast(tensors, lambda name, tensor: tensor.double()), False),
    ):
        given = cast(given, lambda name, tensor: tensor.detach().requires_grad_())
        with torch.autocast("cpu", dtype, enabled=autocast):
            z = call(sublayer, given, backend=backend)
            dz = randn(*z.shape, seed=7).to(z.dtype)
            if inside:
                grads = torch.autograd.grad(z, [*leaves(given).values()], dz)
        if not inside:
            grads = torch.autograd.grad(z, [*leaves(given).values()], dz)
        results.append({"z": z.detach(), **dict(zip(leaves(given), grads, strict=True))})
    kernel, eager, exact = results
    assert kernel["z"].dtype == eager["z"].dtype
    single = [name for name in exact if exact[name].numel() == 1]
    for name in exact:
        if name in single:
            continue  # a single number has one error, which may be none by luck
        found = measure(name, kernel[name].to(eager[name].dtype), eager[name], exact[name])
        assert found.passed, found
    assert all(kernel[name].dtype == tensor.dtype for name, tensor in leaves(tensors).items())
