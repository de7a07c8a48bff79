"""The registered operations: schemas, shape functions, and torch.compile through every public function."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_kernels import MediaMask, masked_cross_attention
from flamingo_kernels._backends import library
from flamingo_kernels.testing import (
    DTYPES,
    Case,
    GatedResidualCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    evaluate,
    lay_out,
)
from tests.helpers.same import assert_same

NAMES = ("masked_cross_attention", "perceiver_attention", "gated_residual")
CASES = [
    MaskedCrossAttentionCase(length=11),
    MaskedCrossAttentionCase(length=11, immediate=False, policy="open_flamingo", groups=2),
    MaskedCrossAttentionCase(length=11, media=1, latents=300),
    PerceiverAttentionCase(lengths=(3, 21)),
    GatedResidualCase(gate=(40,)),
    GatedResidualCase(gate=()),
]


def operation(name: str, backend: str):
    return library.backends_of(name)[backend]


def case_name(case: Case) -> str:
    return f"{case.operator}-{case}"


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operator_has_one_forward_and_one_backward():
    """But for a decoding step, for inference alone, and linear, whose gradients are torch's products."""
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "flamingo_kern" in name
    }
    both = {f"{name}_{way}" for name in NAMES for way in ("fwd", "bwd")}
    both |= {"gated_block_decode_fwd", "linear_fwd"}
    others = {f"{name}.{way}" for name in both for way in ("triton", "cuda")}
    dense = {f"dense_{kind}_attention_{way}" for kind in ("cross", "perceiver") for way in ("fwd", "bwd")}
    assert registered == both | others | dense


def test_the_extension_has_a_kernel_for_each(compiled):
    for name in NAMES:
        for way in ("fwd", "bwd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flamingo_kernels::{name}_{way}", "CPU")


def calls(dtype: torch.dtype, backend: str) -> dict[str, tuple]:
    """Arguments for each of the six operations."""
    masked = MaskedCrossAttentionCase(dtype=dtype, groups=2, immediate=False)
    q, k, v = masked.tensors().values()
    mask = masked.mask()
    spans = (mask.lo, mask.hi, mask.start, mask.stop, mask.immediate, True, 0.25)
    perceiver = PerceiverAttentionCase(dtype=dtype).tensors()
    q_latents, *keys = perceiver.values()
    lengths = torch.tensor([3, 21], dtype=torch.int32)
    x, y, gate = GatedResidualCase(shape=(7, 40), dtype=dtype).tensors().values()
    forward = {
        "masked_cross_attention_fwd": (q, k, v, *spans),
        "perceiver_attention_fwd": (q_latents, *keys, lengths, 0.25),
        "gated_residual_fwd": (x, y, gate),
    }
    out, lse = operation("masked_cross_attention_fwd", backend)(*forward["masked_cross_attention_fwd"])
    out_latents, lse_latents = operation("perceiver_attention_fwd", backend)(
        *forward["perceiver_attention_fwd"]
    )
    return forward | {
        "masked_cross_attention_bwd": (q, q, k, v, out, lse, *spans),
        "perceiver_attention_bwd": (q_latents, q_latents, *keys, out_latents, lse_latents, lengths, 0.25),
        "gated_residual_bwd": (x, y, gate),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", [f"{name}_{way}" for name in NAMES for way in ("fwd", "bwd")])
def test_opcheck(name, dtype, kernels):
    """Inputs without requires_grad: autograd is not registered on the operations but wraps them."""
    torch.library.opcheck(operation(name, kernels), calls(dtype, kernels)[name])


@pytest.mark.parametrize("kind", ["cross", "perceiver"])
def test_a_captured_graph_does_not_repeat_what_was_decided_once(kind):
    for way in ("fwd", "bwd"):
        composed = getattr(torch.ops.flamingo_kernels, f"dense_{kind}_attention_{way}").default
        assert torch.Tag.cudagraph_unsafe in composed.tags


@pytest.mark.parametrize("way", ["fwd", "bwd"])
@pytest.mark.parametrize("name", ["masked_cross_attention", "perceiver_attention"])
def test_a_shape_function_knows_that_outputs_are_contiguous(name, way, kernels):
    """Whatever the strides of the inputs: a graph that was traced with others would misread them."""
    arguments = [
        lay_out(each, "transposed") if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in calls(torch.float32, kernels)[f"{name}_{way}"]
    ]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        outputs = operation(f"{name}_{way}", kernels)(*fakes)
    assert all(out.is_contiguous() for out in outputs)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_compiled_forward_and_backward(case, backend):
    assert_same_compiled(case, backend, "aot_eager")


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("case", [CASES[1], pytest.param(CASES[3], marks=pytest.mark.slow)], ids=case_name)
def test_compiled_by_inductor(case, compiled):
    assert_same_compiled(case, compiled, "inductor")


def assert_same_compiled(case: Case, backend: str, compiler: str) -> None:
    options = case.options()

    @functools.partial(torch.compile, fullgraph=True, backend=compiler)
    def compiled(**tensors):
        outputs = case.function(**tensors, **options, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    expected = evaluate(case, functools.partial(case.kernel, backend), tensors, douts)
    assert_same(evaluate(case, compiled, tensors, douts), expected)


def attend(q, k, v, locations, backend):
    mask = MediaMask.last_preceding(locations, k.shape[1])
    return masked_cross_attention(q, k, v, mask, backend=backend)


def test_a_mask_of_any_length_is_compiled_once(backend):
    """The graph holds the mask's construction, and one compilation serves every T."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (33, 64, 111):
        case = MaskedCrossAttentionCase(length=length)
        leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
        locations = case.media_locations()
        torch._dynamo.mark_dynamic(leaves["q"], 1)
        torch._dynamo.mark_dynamic(locations, 1)
        expected = attend(*leaves.values(), locations, backend)
        out = compiled(*leaves.values(), locations, backend)
        assert_same(out, expected)
        (dout,) = case.douts((out,))
        found, expected = (torch.autograd.grad(each, list(leaves.values()), dout) for each in (out, expected))
        assert_same(found, expected)
    assert counter.frame_count == 1


def test_a_fixed_length_would_be_compiled_again(backend):
    """The counter counts: without dynamic T every length costs a compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=False)
    for length in (33, 64):
        case = MaskedCrossAttentionCase(length=length)
        compiled(*case.tensors().values(), case.media_locations(), backend)
    assert counter.frame_count == 2


def test_a_mask_may_be_passed_into_a_compiled_function(backend):
    case = MaskedCrossAttentionCase(length=11, immediate=False)
    q, k, v = case.tensors().values()
    mask = case.mask()
    compiled = torch.compile(
        lambda mask: masked_cross_attention(q, k, v, mask, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(mask), masked_cross_attention(q, k, v, mask, backend=backend))


@pytest.mark.parametrize("operator", ["perceiver_attention", "gated_residual"])
def test_any_number_of_rows_is_compiled_once(operator, backend):
    counter = CompileCounterWithBackend("aot_eager")
    made = {
        "perceiver_attention": lambda rows: PerceiverAttentionCase(features=rows),
        "gated_residual": lambda rows: GatedResidualCase(shape=(2, rows, 40)),
    }[operator]
    compiled = torch.compile(functools.partial(made(3).kernel, backend), fullgraph=True, backend=counter)
    for rows in (33, 64, 111):
        case = made(rows)
        tensors = case.tensors()
        expected = case.kernel(backend, **tensors)
        for name in set(tensors) & {"k_media", "v_media", "x", "y"}:
            torch._dynamo.mark_dynamic(tensors[name], 1)
        assert_same(compiled(**tensors), expected)
    assert counter.frame_count == 1


def test_autocast_is_compiled_too(backend):
    case = MaskedCrossAttentionCase(length=11)
    q, k, v = case.tensors().values()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(q, k, v, case.media_locations(), backend)
        expected = attend(q, k, v, case.media_locations(), backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_a_traced_call_does_not_ask_what_the_oldest_torch_cannot_trace(monkeypatch):
    """Torch 2.10 stops at this function, as any torch stops at one that is disabled."""
    untraceable = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    case = MaskedCrossAttentionCase(length=11)
    arguments = *case.tensors().values(), case.media_locations(), "reference"
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), attend(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("immediate", [True, False])
def test_a_shape_function_knows_which_rows_are_one_tile(immediate, dtype, kernels):
    """Of those nothing of the softmax is kept; how many keys a tile has each backend decides itself."""
    forward = library.backends_of("masked_cross_attention_fwd")[kernels]
    for latents in (1, 31, 32, 33, 63, 64, 65, 128, 129):
        q, k = torch.randn(1, 2, 1, 8, dtype=dtype), torch.randn(1, 1, latents, 1, 8, dtype=dtype)
        mask = MediaMask.from_text_time(torch.tensor([[0, 1]]), 1, immediate=immediate)
        arguments = (q, k, k, *mask.spans, immediate, False, 1.0)
        with FakeTensorMode() as mode:
            fake = forward(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        assert [each.shape for each in fake] == [each.shape for each in forward(*arguments)], latents
