"""Second derivatives: refused by name whichever way they are asked for, and right by the reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flamingo import GatedCrossAttentionBlock
from flamingo_kernels import UnsupportedError, patch, use_backend
from flamingo_kernels.testing import (
    GatedResidualCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    open_gates,
)
from tests.helpers.sublayer_cases import CrossAttentionCase, FeedForwardCase

CASES = [
    MaskedCrossAttentionCase(batch=1, length=5),
    MaskedCrossAttentionCase(batch=1, length=5, immediate=False, policy="open_flamingo"),
    PerceiverAttentionCase(lengths=(3, 21)),
    GatedResidualCase(shape=(3, 5)),
    CrossAttentionCase(length=5, q_norm=True),
    FeedForwardCase(rows=(3,), glu=True, activation="silu"),
]
WAYS = {
    "grad": lambda total, leaf: torch.autograd.grad(total, leaf, retain_graph=True),
    "backward": lambda total, leaf: total.backward(retain_graph=True),
    "backward of one": lambda total, leaf: total.backward(inputs=[leaf], retain_graph=True),
}


def leaves_of(case, dtype=torch.float32):
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in case.tensors().items()}


def gradients(run, leaves):
    """The gradients of the sum of all outputs, with a graph for another derivative."""
    total = sum(out.sum() for out in run(**leaves))
    return torch.autograd.grad(total, list(leaves.values()), create_graph=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case}")
def test_every_way_is_refused_by_name(case, way, compiled):
    leaves = leaves_of(case)
    firsts = gradients(lambda **t: case.kernel(compiled, **t), leaves)
    penalty = sum(first.square().sum() for first in firsts)
    if case.operator == "gated_residual":
        del leaves["x"]  # on which no gradient depends
    for leaf in leaves.values():
        with pytest.raises(
            UnsupportedError, match=f"^{case.operator}: .*cpu.* cannot .*use_backend"
        ) as caught:
            WAYS[way](leaf.sum() + penalty, leaf)
        assert list(caught.value.reasons) == [compiled]


def test_what_lies_before_and_behind_the_operator_is_refused_too(compiled):
    x, y, gate = (torch.randn(size, requires_grad=True) for size in ((3, 4), (3, 4), (1,)))
    (z,) = GatedResidualCase().kernel(compiled, x=x, y=y.exp(), gate=gate)
    (first,) = torch.autograd.grad(z.square().sum(), [gate], create_graph=True)
    with pytest.raises(UnsupportedError, match="gated_residual"):
        torch.autograd.grad(x.sum() + first.sum(), x)  # by way of dz
    with pytest.raises(UnsupportedError, match="gated_residual"):
        torch.autograd.grad(y.sum() + first.sum(), y)


@pytest.mark.parametrize("reentrant", [False, True], ids=["without", "reentrant"])
def test_checkpoints_have_first_derivatives(reentrant, compiled):
    case = CASES[2]
    leaves = leaves_of(case)
    expected = gradients(lambda **t: case.kernel(compiled, **t), leaves)
    again = leaves_of(case)
    outputs = checkpoint(
        lambda *t: case.kernel(compiled, **dict(zip(again, t, strict=True))),
        *again.values(),
        use_reentrant=reentrant,
    )
    total = sum(out.sum() for out in outputs)
    if reentrant:
        total.backward()
        found = [leaf.grad for leaf in again.values()]
    else:
        found = torch.autograd.grad(total, list(again.values()), create_graph=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case}")
def test_the_reference_has_them(case):
    seconds = []
    for run in (case.eager, lambda **t: case.kernel("reference", **t)):
        leaves = leaves_of(case, torch.float64)
        penalty = sum(first.square().sum() for first in gradients(run, leaves))
        seconds.append(torch.autograd.grad(penalty, list(leaves.values()), materialize_grads=True))
    assert any(second.any() for second in seconds[0])
    torch.testing.assert_close(seconds[1], seconds[0])


def test_a_patched_block_has_them_under_the_reference():
    block = open_gates(GatedCrossAttentionBlock(dim=16, dim_visual=8)).double()
    x, media = torch.randn(2, 6, 16).double(), torch.randn(2, 2, 4, 8).double()
    inputs = (x, media, torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]))
    weights = list(block.parameters())

    def seconds():
        firsts = torch.autograd.grad(block(*inputs).square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(first.square().sum() for first in firsts), weights)

    expected = seconds()
    patch(block)
    with use_backend("reference"):
        torch.testing.assert_close(seconds(), expected)
    block.float()
    inputs = (x.float(), media.float(), inputs[2])
    with pytest.raises(UnsupportedError, match=r"^gated_(feed_forward|cross_attention): "):
        seconds()


def test_a_tangent_of_the_gradient_is_refused(compiled):
    case = GatedResidualCase()
    leaves = leaves_of(case)
    (z,) = case.kernel(compiled, **leaves)
    with forward_ad.dual_level():
        dz = forward_ad.make_dual(torch.ones_like(z), torch.ones_like(z))
        with pytest.raises(UnsupportedError, match="gated_residual"):
            torch.autograd.grad(z, list(leaves.values()), dz)
