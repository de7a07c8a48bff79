"""What holds for every operator: determinism, subsets of gradients, autocast, checkpointing, no host sync."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from flamingo_kernels import MediaMask, use_backend
from flamingo_kernels._backends import cpu, dispatch
from flamingo_kernels.testing import (
    DTYPES,
    Case,
    GatedResidualCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    evaluate,
    lay_out,
)
from tests.helpers.same import assert_same

ATTENTION = [
    MaskedCrossAttentionCase(),
    MaskedCrossAttentionCase(immediate=False, policy="open_flamingo", groups=2),
    PerceiverAttentionCase(lengths=(3, 21)),
]
RESIDUAL = [
    GatedResidualCase(),
    GatedResidualCase(gate=(40,)),
]
# Whose gradients are ours. Those of linear are torch's products, which add up in another order for other
# strides and threads.
OURS = [*ATTENTION, *RESIDUAL]
SMALL = [
    *OURS,
    LinearCase(activation="silu"),
    LinearCase(activation="gelu", residual=True, gate=(24,)),
]
# enough rows, heads and media for every thread
LARGE = [
    MaskedCrossAttentionCase(batch=3, length=257, media=5, latents=60, groups=2, policy="open_flamingo"),
    MaskedCrossAttentionCase(length=257, media=5, times="jumps", immediate=False, policy="open_flamingo"),
    PerceiverAttentionCase(clips=3, queries=64, features=257, latents=64, groups=2, lengths=(257, 0, 100)),
    GatedResidualCase(shape=(1031, 130)),
    GatedResidualCase(shape=(1031, 130), gate=(130,)),
]


def name(case: Case) -> str:
    return f"{case.operator}-{case}"


@pytest.fixture(autouse=True)
def skip_without_kernel(request):
    """Not every backend has a kernel of every operator."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend = str(given.get("backend", given.get("kernels", "reference"))).partition(", ")[0]
    if "case" in given and backend not in dispatch.limits(operator := given["case"].operator):
        pytest.skip(f"{operator} has no {backend} kernel")


def run(case: Case, backend: str) -> dict[str, torch.Tensor]:
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    return evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", LARGE, ids=name)
def test_threads_and_repeats_change_nothing(case, dtype, compiled, set_threads):
    case = replace(case, dtype=dtype)
    set_threads(1)
    expected = run(case, compiled)
    for threads in (1, 2, 4, 4, 3):
        set_threads(threads)
        assert_same(run(case, compiled), expected)
        assert cpu.threads_of_latest_run() == threads


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_few_elements_wake_no_thread(case, compiled, set_threads):
    """A thread is worth waking for some ten thousand elements."""
    set_threads(4)
    with torch.no_grad():
        case.kernel(compiled, **case.tensors())
        assert cpu.threads_of_latest_run() == 1
    run(case, compiled)
    assert cpu.threads_of_latest_run() == 1


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_any_subset_of_gradients(case, backend):
    """A gradient is the same whichever others are asked for."""
    expected = run(case, backend)
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    for count in (0, 1, len(tensors) - 1):
        for chosen in itertools.combinations(tensors, count):
            leaves = {key: tensor.detach() for key, tensor in tensors.items()}
            wanted = [leaves[key].requires_grad_() for key in chosen]
            outputs = case.kernel(backend, **leaves)
            live = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if out.requires_grad]
            assert bool(live) is bool(chosen)
            if chosen:
                outs, grads = zip(*live, strict=True)
                grads = torch.autograd.grad(outs, wanted, grads, materialize_grads=True)
                found = {f"d{key}": grad for key, grad in zip(chosen, grads, strict=True)}
                assert_same(found, {key: expected[key] for key in found})


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_the_gradient_of_a_sum(case, backend):
    """`.sum().backward()` sends one number expanded to every element: all strides are 0."""
    leaves = {key: tensor.requires_grad_() for key, tensor in case.tensors().items()}
    outputs = case.kernel(backend, **leaves)
    ones = [torch.ones_like(out) for out in outputs]
    expected = torch.autograd.grad(outputs, list(leaves.values()), ones, retain_graph=True)
    found = torch.autograd.grad(sum(out.sum() for out in outputs), list(leaves.values()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# Of two dimensions, as rows of three are copied together unless they lie evenly.
ROWS = GatedResidualCase(shape=(21, 40))


@pytest.mark.parametrize("case", [*OURS, ROWS], ids=name)
def test_each_tensor_has_strides_of_its_own(case, kernels):
    tensors, layouts = case.tensors(), itertools.cycle(("transposed", "slice", "contiguous"))
    douts = case.douts(case.eager(**tensors))
    expected = evaluate(case, lambda **t: case.kernel(kernels, **t), tensors, douts)
    tensors = {key: lay_out(tensor, next(layouts)) for key, tensor in tensors.items()}
    douts = [lay_out(dout, next(layouts)) for dout in douts]
    assert_same(evaluate(case, lambda **t: case.kernel(kernels, **t), tensors, douts), expected)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("case", OURS, ids=name)
def test_a_gradient_may_have_any_strides(case, layout, kernels):
    tensors = case.tensors()
    douts = [lay_out(dout, layout) for dout in case.douts(case.eager(**tensors))]
    found, expected = (
        evaluate(case, lambda **t: case.kernel(kernels, **t), tensors, each)
        for each in (douts, [dout.contiguous() for dout in douts])
    )
    assert_same(found, expected)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_outputs_and_gradients_are_contiguous(case, backend):
    case = replace(case, layout="transposed")
    leaves = {key: tensor.requires_grad_() for key, tensor in case.tensors().items()}
    outputs = case.kernel(backend, **leaves)
    assert all(out.is_contiguous() for out in outputs)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_inputs_are_left_alone(case, backend):
    tensors = case.tensors()
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    douts = case.douts(case.eager(**tensors))
    douts_before = [dout.clone() for dout in douts]
    evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)
    assert all(map(torch.equal, douts, douts_before))


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_checkpointing_recomputes_the_same(case, backend):
    expected = run(case, backend)
    douts = case.douts(case.eager(**case.tensors()))

    def checkpointed(**tensors):
        return checkpoint(lambda: case.kernel(backend, **tensors), use_reentrant=False)

    assert_same(evaluate(case, checkpointed, case.tensors(), douts), expected)


@pytest.mark.parametrize("case", ATTENTION, ids=name)
def test_autocast_runs_attention_in_its_dtype(case, backend):
    expected = run_cast(case, backend, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = {key: tensor.requires_grad_() for key, tensor in case.tensors().items()}
        (out,) = case.kernel(backend, **leaves)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected["out"])
    (dout,) = case.douts((out,))
    for key, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected[f"d{key}"].float()), key


@pytest.mark.parametrize("case", ATTENTION, ids=name)
def test_autocast_of_tensors_in_every_dtype(case, backend):
    """One dtype each, as a matrix product takes them."""
    dtypes = itertools.cycle((torch.float16, torch.float32, torch.bfloat16))
    tensors = {
        key: tensor.to(dtype) for (key, tensor), dtype in zip(case.tensors().items(), dtypes, strict=False)
    }
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = case.kernel(backend, **tensors)
    (expected,) = case.kernel(backend, **{key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", ATTENTION, ids=name)
def test_autocast_leaves_float64(case):
    tensors = {key: tensor.double() for key, tensor in case.tensors().items()}
    (expected,) = case.kernel("reference", **tensors)
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = case.kernel("reference", **tensors)
    assert torch.equal(out, expected)


def run_cast(case: Case, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {key: tensor.to(dtype) for key, tensor in case.tensors().items()}
    douts = case.douts(case.eager(**tensors))
    return evaluate(case, lambda **t: case.kernel(backend, **t), tensors, douts)


@pytest.mark.parametrize("case", RESIDUAL, ids=name)
def test_autocast_leaves_the_residual_in_its_dtype(case, backend):
    expected = run(case, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.kernel(backend, **case.tensors())
    assert all(torch.equal(out, expected[key]) for key, out in zip(case.outputs, found, strict=True))


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_no_host_sync(case, backend):
    """Tensors without values pass through every check: none of them looks at one."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, use_backend(backend):
        leaves = {key: mode.from_tensor(tensor).requires_grad_() for key, tensor in case.tensors().items()}
        outputs = case.kernel("auto", **leaves)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(out) for out in outputs])


@pytest.mark.parametrize("build", ["last_preceding", "all_preceding", "cached", "from_text_time"])
def test_masks_need_no_host_sync(build):
    with FakeTensorMode():
        locations = torch.zeros(2, 5, dtype=torch.int64)
        more = (3,) if build == "cached" else ()
        mask = getattr(MediaMask, build)(locations, 2, *more)
        assert mask.dense(4).shape == (2, 1, 3 if build == "cached" else 5, 8)
