"""The sublayers against float64, each gradient, and what they do not keep or compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels import UnsupportedError
from flamingo_kernels.commands.measure.memory import saved_bytes
from flamingo_kernels.sublayers import Linear, Norm, gated_feed_forward, gated_linear, scratch
from flamingo_kernels.sublayers import norm as norms
from flamingo_kernels.sublayers.activation import ACTIVATIONS
from flamingo_kernels.testing import DTYPES, assert_all_passed, measure, ulp
from tests.helpers.parity import hold
from tests.helpers.products import Products
from tests.helpers.sublayer_cases import CrossAttentionCase as Attention
from tests.helpers.sublayer_cases import FeedForwardCase as FeedForward
from tests.helpers.sublayer_cases import linear

CASES = [
    Attention(),
    Attention(immediate=False, groups=2),
    Attention(rms=True, biased=True),
    Attention(gate=(24,), biased=True),
    Attention(gate=()),
    Attention(gate=None),
    Attention(gate=None, biased=True),
    *(Attention(q_norm=True, rms=rms, groups=groups) for rms in (False, True) for groups in (1, 2)),
    *(Attention(q_norm=True, rms=rms, eps=0.1, q_eps=1.0) for rms in (False, True)),
    Attention(policy="open_flamingo", immediate=False, scale=-0.7),
    Attention(q_norm=True, length=0),
    Attention(batch=3, length=1, width=7),
    Attention(batch=1, length=3, width=48),
    Attention(length=0),
    Attention(batch=0),
    Attention(media=0),
    Attention(width=0),
    FeedForward(),
    *(FeedForward(activation=activation) for activation in ACTIVATIONS),
    *(FeedForward(activation=activation, glu=True) for activation in ("silu", "gelu")),
    FeedForward(rms=True, biased=True, glu=True, activation="silu"),
    FeedForward(gate=(24,), biased=True),
    FeedForward(gate=(1, 1, 24)),
    *(FeedForward(rms=rms, eps=0.1) for rms in (False, True)),
    FeedForward(gate=None),
    FeedForward(gate=None, biased=True, rms=True),
    FeedForward(rows=(5,)),
    FeedForward(rows=(0, 3)),
    FeedForward(inner=0),
    *(
        kind(layout=layout)
        for kind in (Attention, FeedForward)
        for layout in ("slice", "transposed", "strided")
    ),
    *(kind(layout="strided", gate=(24,)) for kind in (Attention, FeedForward)),
    Attention(layout="expanded"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__[:-4]}:{case}")
def test_oracle(case, dtype, backend):
    assert_all_passed(measure(replace(case, dtype=dtype), backend), str(case))


@pytest.mark.parametrize("case", [Attention(gate=(24,)), FeedForward(rows=(300,))], ids=str)
def test_columns_that_are_apart_in_memory(case, backend):
    """Text and weights with a stride of two, where a kernel reads them beside a product."""
    assert_all_passed(measure(replace(case, layout="strided"), backend), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("least", [0, 2**20], ids=["in scratch", "small"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__[:-4]}:{case}")
@torch.no_grad()
def test_oracle_of_inference(case, least, dtype, monkeypatch):
    monkeypatch.setattr(scratch, "_LEAST", least)
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    (ours,) = case.kernel("auto", **tensors)
    (exact,) = case.eager(**{name: tensor.double() for name, tensor in tensors.items()})
    measured = hold("z", ours, lambda: case.eager(**tensors)[0], exact)
    assert measured.passed, measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", [8, 40], ids=["by rows", "by weights"])
@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_the_gradient_of_one_gate(kind, rows, dtype):
    case = Attention(batch=1, length=rows) if kind == "attention" else FeedForward(rows=(rows,))
    found = []
    for seed in range(16):
        found += [m for m in measure(replace(case, dtype=dtype, seed=seed), "cpu") if m.name == "dgate"]
    ours, rounding = (torch.tensor([getattr(m, name) for m in found]) for name in ("error", "rounding"))
    assert ours.square().mean() <= (rounding / 2).square().mean()


@pytest.mark.parametrize("case", [Attention(), FeedForward(), FeedForward(biased=True)], ids=str)
def test_oracle_of_a_wider_gate(case, backend):
    """A float32 gate beside bfloat16 promotes the residual, so that it cannot ride on the product."""
    assert_all_passed(
        measure(replace(case, dtype=torch.bfloat16, gate_dtype=torch.float32), backend), str(case)
    )


@pytest.mark.parametrize("case", [Attention(), FeedForward(), FeedForward(gate=(24,))], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_gradient_of_a_closed_gate(case, backend):
    """At 0 nothing of the branch is in the sum, and the gate still learns."""
    tensors = case.tensors()
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    grads = []
    for run in (case.eager, lambda **t: case.kernel(backend, **t)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        (z,) = run(**leaves)
        assert torch.equal(z, leaves["x"])
        grads.append(torch.autograd.grad(z, leaves["gate"], torch.ones_like(z))[0])
    assert grads[1].abs().min() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("gates", [1, 2])
def test_what_a_bias_sends_a_gate_is_summed_in_float32(gates):
    """Of two sums in bfloat16, 4099 and 4096, nothing is left."""
    dz = torch.ones(4099, 2, dtype=torch.bfloat16)
    dz[:3, 1] = 0
    to_out = Linear(torch.zeros_like(dz[:2]), torch.tensor([1.0, -1.0]).bfloat16())
    needs = {"needs_weight": False, "needs_bias": False, "needs_gate": True}
    gate = torch.zeros(gates, dtype=torch.bfloat16)
    found = gated_linear.backward(dz, torch.zeros_like(dz), to_out, gate, "cpu", **needs).gate
    assert found.tolist() == ([3] if gates == 1 else [4099, -4096])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_norm_learns_is_summed_in_float32(dtype):
    """In bfloat16, as torch on a CPU adds it up, 300 ones are 256."""
    dn, x, ones = torch.ones(3000, 8).to(dtype), torch.randn(3000, 8).to(dtype), torch.ones(8).to(dtype)
    norm = Norm(ones, torch.zeros_like(ones))
    _, statistics = norms.forward(x, norm)
    dx, dweight, dbias = norms.backward(dn, x, norm, statistics, needs_parameters=True)
    exact = torch.nn.functional.layer_norm(x.double(), (8,)).sum(0)
    assert dbias.tolist() == [torch.tensor(3000.0).to(dtype).item()] * 8
    assert (dweight.double() - exact).abs().max() <= 2 * ulp(exact.abs().max().item(), dtype)
    assert [each.dtype for each in (dx, dweight, dbias)] == [dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Attention(), FeedForward(), FeedForward(gate=(24,), biased=True)], ids=str)
def test_the_gradient_of_an_open_gate(case, dtype):
    """1 - tanh(gate)^2 is what is left of near numbers, unless it is computed otherwise."""
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    tensors["gate"] = torch.full_like(tensors["gate"], -8.5)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    grads = []
    for leaves, run in ((doubles, case.eager), (tensors, lambda **t: case.kernel("cpu", **t))):
        leaves["gate"].requires_grad_()
        (z,) = run(**leaves)
        grads.append(torch.autograd.grad(z.sum(), leaves["gate"])[0].double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        grads[1], grads[0], rtol=tolerance, atol=tolerance * grads[0].abs().max().item()
    )


@pytest.mark.parametrize(
    ("case", "frozen", "products"),
    [
        (Attention(), (), 4),
        (Attention(), ("q_weight",), 3),
        (Attention(), ("q_weight", "out_weight"), 2),
        (Attention(), ("x", "norm_weight", "norm_bias"), 3),
        (Attention(q_norm=True), ("q_weight", "q_norm_weight", "q_norm_bias"), 3),
        (FeedForward(), (), 4),
        (FeedForward(), ("up_weight", "down_weight"), 2),
        (FeedForward(), ("x", "norm_weight", "norm_bias", "up_weight"), 2),
        (FeedForward(glu=True), ("gate_proj_weight",), 5),
    ],
    ids=str,
)
def test_frozen_parameters_cost_no_product(case, frozen, products):
    leaves = {name: tensor.requires_grad_(name not in frozen) for name, tensor in case.tensors().items()}
    (z,) = case.kernel("cpu", **leaves)
    with Products() as seen:
        z.sum().backward()
    assert len(seen.shapes) == products, seen.shapes
    assert all((tensor.grad is None) == (name in frozen) for name, tensor in leaves.items())


@pytest.mark.parametrize(
    "case",
    [
        Attention(q_norm=True, biased=True),
        Attention(length=40, gate=(24,), biased=True),
        Attention(gate=None, rms=True, q_norm=True),
        FeedForward(biased=True, glu=True, activation="silu"),
        FeedForward(rows=(5,), gate=(24,), biased=True, rms=True),
        FeedForward(gate=None, biased=True),
    ],
    ids=lambda case: f"{type(case).__name__[:-4]}:{case}",
)
def test_a_gradient_is_the_same_whichever_others_are_asked_for(case):
    """Of one tensor alone, as where biases are all that is trained, and of all others."""
    tensors = case.tensors()

    def gradients(wanted):
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        (z,) = case.kernel("cpu", **leaves)
        found = torch.autograd.grad(z.square().sum(), [leaves[name] for name in wanted])
        return dict(zip(wanted, found, strict=True))

    expected = gradients(list(tensors))
    for chosen in tensors:
        for wanted in ([chosen], [name for name in tensors if name != chosen]):
            for name, gradient in gradients(wanted).items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "share"), [(Attention(length=64, media=8, latents=16), 0.5), (FeedForward(), 0.5)]
)
def test_what_is_kept_for_the_backward_pass(case, share):
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    model = nn.ParameterList(map(nn.Parameter, leaves.values()))
    leaves = dict(zip(leaves, model, strict=True))
    ours, eager = (
        saved_bytes(lambda run=run: run(**leaves), model)
        for run in (lambda **t: case.kernel("cpu", **t), case.eager)
    )
    assert ours <= share * eager, (ours, eager)


@pytest.mark.parametrize("rms", [False, True])
def test_scratch_memory_does_not_leak_into_results(rms):
    """Sizes that take it, twice, with other values in between."""
    case = FeedForward(rows=(300,), width=1024, inner=1024, rms=rms, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}

    def run():
        (z,) = case.kernel("cpu", **leaves)
        return z, *torch.autograd.grad(z.square().sum(), list(leaves.values()))

    first = run()
    copies = [tensor.clone() for tensor in first]
    assert scratch._pool()
    for piece in scratch._pool():
        piece.fill_(255)
    second = run()
    for now, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(now, copy)
        assert torch.equal(again, copy)
    scratch.release()
    assert not scratch._pool()


def test_inference_first_and_training_after():
    case = FeedForward(rows=(64,), width=64, inner=8192)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    scratch.release()
    with torch.inference_mode():
        case.kernel("cpu", **leaves)
    assert [piece.is_inference() for piece in scratch._pool()] == [False]
    case.kernel("cpu", **leaves)[0].sum().backward()


@pytest.mark.parametrize("case", [Attention(), FeedForward(), FeedForward(rows=(64,), inner=8192)], ids=str)
def test_fake_tensors(case):
    """Shapes and dtypes without numbers, and no memory of theirs is kept."""
    scratch.release()
    with FakeTensorMode() as mode:
        leaves = {name: mode.from_tensor(tensor).requires_grad_() for name, tensor in case.tensors().items()}
        (z,) = case.kernel("cpu", **leaves)
        grads = torch.autograd.grad(z.sum(), list(leaves.values()))
    assert z.shape == leaves["x"].shape
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]
    assert not scratch._pool()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "expected activation to be one of gelu"),
        ({"gate": torch.zeros(5)}, "expected a gate of 1 or D=24"),
        ({"norm": Norm(torch.ones(24), torch.ones(24), rms=True)}, r"expected no norm\.bias with rms=True"),
        ({"norm": Norm(torch.ones(24), eps=-1e-5)}, r"expected norm\.eps to be a finite number"),
    ],
)
def test_bad_input(change, message):
    case = FeedForward()
    t = case.tensors()
    arguments = {"up": linear(t, "up"), "down": linear(t, "down"), "gate": t["gate"], "norm": case.norm(t)}
    with pytest.raises(ValueError, match=message):
        gated_feed_forward(t["x"], **(arguments | change))


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "message"),
    [
        (24, 1, "expected to_q.weight to give a multiple of head_dim=24 features, got 64"),
        (0, 1, "expected to_q.weight to give a multiple of head_dim=0 features"),
        (16, 3, "the 4 heads of q to be a multiple of .* got 3"),
    ],
)
def test_keys_that_do_not_fit_the_queries(head_dim, kv_heads, message):
    case = Attention()
    media = torch.zeros(2, 3, 5, kv_heads, head_dim)
    with pytest.raises(ValueError, match=message):
        case.kernel("auto", **case.tensors() | {"k": media, "v": media})


@pytest.mark.parametrize("name", ["norm_weight", "gate"])
@pytest.mark.parametrize("case", [Attention(), FeedForward()], ids=["attention", "feed_forward"])
def test_one_tensor_that_no_kernel_takes_leaves_all_to_the_reference(case, name, compiled):
    tensors = case.tensors()
    tensors[name] = tensors[name].double()
    with pytest.raises(UnsupportedError, match=r"dtype torch\.float64 is not one of"):
        case.kernel(compiled, **tensors)
