"""torch.func's transforms and forward mode: right by the reference, refused where a kernel is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from flamingo import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_kernels import MediaMask, UnsupportedError, _kept, masked_cross_attention, patch, use_backend
from flamingo_kernels.testing import (
    GatedResidualCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    open_gates,
)
from tests.helpers.sublayer_cases import CrossAttentionCase, FeedForwardCase

OPERATORS = [
    MaskedCrossAttentionCase(batch=1, length=5, latents=3, head_dim=8),
    PerceiverAttentionCase(clips=1, queries=2, features=5, latents=2, head_dim=8, lengths=(3,)),
    GatedResidualCase(shape=(3, 5)),
]
SUBLAYERS = [
    CrossAttentionCase(batch=1, length=5, width=8, heads=2, head_dim=8),
    FeedForwardCase(rows=(3,), width=8, inner=5, glu=True, activation="silu"),
]
CASES = [*OPERATORS, *SUBLAYERS]


def total_of(run):
    return lambda tensors: sum(out.square().sum() for out in run(**tensors))


def each_of(run):
    return vmap(run, randomness="same")  # a case draws its mask, from a generator of its own


def dual(run, tensors, tangents):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(tensors[name], tangents[name]) for name in tensors}
        return [forward_ad.unpack_dual(out).tangent for out in run(**duals)]


TRANSFORMS = {
    "grad": lambda run, t, _: grad(total_of(run))(t),
    "vmap": lambda run, t, u: each_of(lambda each: run(**each))({k: torch.stack([t[k], u[k]]) for k in t}),
    "vmap of grad": lambda run, t, u: each_of(grad(total_of(run)))({k: torch.stack([t[k], u[k]]) for k in t}),
    "jvp": lambda run, t, u: jvp(lambda each: run(**each), (t,), (u,)),
    "jacrev": lambda run, t, _: jacrev(lambda each: run(**each))(t),
    "hessian": lambda run, t, _: jacfwd(jacrev(total_of(run)), randomness="same")(t),
    "dual": dual,
}


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    n = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def inputs_of(case):
    tensors = case.tensors()
    return tensors, {name: torch.randn_like(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_auto_takes_the_reference(case, transform, monkeypatch):
    monkeypatch.setattr(F, "layer_norm", layer_norm)  # torch's has wrong second derivatives under torch.func
    tensors, tangents = inputs_of(case)
    expected = TRANSFORMS[transform](case.eager, tensors, tangents)
    found = TRANSFORMS[transform](lambda **t: case.kernel("auto", **t), tensors, tangents)
    torch.testing.assert_close(found, type(found)(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_a_kernel_that_is_asked_for_refuses(case, transform, kernels):
    why = "forward-mode differentiation" if transform == "dual" else "a transform of torch.func"
    with pytest.raises(UnsupportedError, match=f'backend="{kernels}" was requested but {why}'):
        TRANSFORMS[transform](lambda **t: case.kernel(kernels, **t), *inputs_of(case))


def block():
    return open_gates(GatedCrossAttentionBlock(dim=16, dim_visual=8, dim_head=8, heads=2))


LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # vmap lays the media's numbers out in its own way
def test_gradients_of_each_sample():
    """The mask is made of locations that vmap has taken apart."""
    module = block()
    x, media = torch.randn(3, 6, 16), torch.randn(3, 2, 4, 8)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters, x, media, locations):
        return functional_call(module, parameters, (x[None], media[None], locations[None])).square().sum()

    expected = [grad(loss)(parameters, *each) for each in zip(x, media, LOCATIONS, strict=True)]
    patch(module)
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, media, LOCATIONS)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, torch.stack([each[name] for each in expected]))


@pytest.mark.parametrize("enabled", [True, False], ids=["recording", "no_grad"])
def test_the_derivative_of_a_patched_model_along_its_weights(enabled):
    blocks, resampler = block(), PerceiverResampler(dim=8, depth=2, dim_head=8, heads=2, num_latents=4)
    model = torch.nn.ModuleDict({"resampler": resampler, "block": blocks})
    x, features = torch.randn(3, 6, 16), torch.randn(3, 2, 1, 5, 8)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self):
            return self.parts["block"](x, self.parts["resampler"](features), LOCATIONS)

    whole = Whole()
    weights = {name: weight.detach() for name, weight in whole.named_parameters()}
    along = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def derivative():
        with torch.set_grad_enabled(enabled):
            return jvp(lambda each: functional_call(whole, each, ()), (weights,), (along,))[1]

    expected = derivative()
    patch(whole)
    assert expected.any()
    torch.testing.assert_close(derivative(), expected)


def test_nothing_of_a_transform_is_kept():
    module = block()
    patch(module)
    x, media = torch.randn(3, 6, 16), torch.randn(3, 2, 4, 8)
    with torch.no_grad():
        expected = module(x, media, LOCATIONS)
        kept = vars(_kept._threads)
        kept.clear()
        vmap(lambda *each: module(*(one[None] for one in each)))(x, media, LOCATIONS)
        jvp(lambda m: module(x, m, LOCATIONS), (media,), (media,))
        assert not any(kept.values())
        assert torch.equal(module(x, media, LOCATIONS), expected)


@pytest.mark.parametrize("immediate", [True, False], ids=["last", "all"])
def test_a_mask_that_vmap_makes(immediate):
    build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
    q, k, v = torch.randn(3, 6, 2, 8), torch.randn(3, 2, 4, 2, 8), torch.randn(3, 2, 4, 2, 8)
    expected = masked_cross_attention(q, k, v, build(LOCATIONS, 2), backend="reference")

    def one(q, k, v, locations):
        return masked_cross_attention(q[None], k[None], v[None], build(locations[None], 2))[0]

    torch.testing.assert_close(vmap(one)(q, k, v, LOCATIONS), expected)


@pytest.mark.parametrize("case", SUBLAYERS, ids=lambda case: case.operator)
def test_batched_gradients_of_sublayers_are_refused(case, compiled):
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    (z,) = case.kernel(compiled, **leaves)
    with pytest.raises(UnsupportedError, match=f"^{case.operator}: .*for a batch of them; .*use_backend"):
        torch.autograd.grad(z, list(leaves.values()), torch.ones(2, *z.shape), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch calls the kernel for each
@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.operator)
def test_batched_gradients(case, compiled):
    """`is_grads_batched` maps the backward pass alone, of a forward pass that was a kernel's."""
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    outputs = case.kernel(compiled, **leaves)
    douts = [torch.randn(3, *out.shape) for out in outputs]
    options = {"retain_graph": True, "materialize_grads": True}
    each = [
        torch.autograd.grad(outputs, list(leaves.values()), d, **options) for d in zip(*douts, strict=True)
    ]
    expected = [torch.stack(gradients) for gradients in zip(*each, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), douts, is_grads_batched=True)
    torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.operator)
def test_batched_gradients_cannot_be_differentiated_again(case, compiled):
    """A batch of gradients carries no graph, so a penalty on them would be dropped without a word."""
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    outputs = case.kernel(compiled, **leaves)
    douts = [torch.ones(2, *out.shape) for out in outputs]
    options = {"is_grads_batched": True, "create_graph": True, "materialize_grads": True}
    with pytest.raises(UnsupportedError, match=f"^{case.operator}: .*cannot be differentiated again"):
        torch.autograd.grad(outputs, list(leaves.values()), douts, **options)


def test_a_choice_by_context_is_explicit(compiled):
    case = GatedResidualCase()
    with use_backend(compiled), pytest.raises(UnsupportedError, match=r"a transform of torch\.func"):
        each_of(lambda each: case.kernel("auto", **each))({k: t[None] for k, t in case.tensors().items()})
