"""The registered operations, which anybody can call: what a kernel would dereference is checked before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flamingo_kernels import MediaMask, available_backends
from flamingo_kernels._backends import library
from flamingo_kernels.ops.gated_block_decode.weights import TENSORS
from flamingo_kernels.ops.linear.int8 import quantize_weight
from flamingo_kernels.testing import GatedBlockDecodeCase, LinearCase, lay_out

DECODE = "gated_block_decode_fwd"
T, M, S = 7, 3, 6
FAR = 2**31 - 1  # away from every tensor


def masked(backward: bool) -> dict[str, Any]:
    q, media = torch.randn(2, T, 4, 8), torch.randn(2, M, 5, 2, 8)
    mask = MediaMask.from_text_time(torch.arange(2 * T).view(2, T) % (M + 1), M, immediate=False)
    spans = {"lo": mask.lo, "hi": mask.hi, "start": mask.start, "stop": mask.stop}
    kept = {"out": q.clone(), "softmax": torch.ones(2, 2, 4, T)} if backward else {}
    options = {"immediate": False, "averages": False, "scale": 0.5}
    return with_dout(q, backward) | {"q": q, "k": media, "v": media.clone()} | kept | spans | options


def perceiver(backward: bool) -> dict[str, Any]:
    q, media, latents = torch.randn(2, 5, 4, 8), torch.randn(2, S, 2, 8), torch.randn(2, 3, 2, 8)
    keys = {"k_media": media, "v_media": media.clone(), "k_latents": latents, "v_latents": latents.clone()}
    kept = {"out": q.clone(), "softmax": torch.ones(2, 2, 4, 5)} if backward else {}
    lengths = {"media_lengths": torch.tensor([4, 6], dtype=torch.int32), "scale": 0.5}
    return with_dout(q, backward) | {"q": q} | keys | kept | lengths


def with_dout(q: torch.Tensor, backward: bool) -> dict[str, Any]:
    return {"dout": torch.randn_like(q)} if backward else {}


def residual(backward: bool) -> dict[str, Any]:
    first, y = torch.randn(2, 3, 8)
    return {"dz" if backward else "x": first, "y": y, "gate": torch.randn(8)}


def linear(integers: bool) -> dict[str, Any]:
    case = LinearCase(rows=(3,), residual=True, gate=(24,))
    given = case.tensors() | {"weight_scale": None, "activation": 1}
    if integers:
        given["weight"], given["weight_scale"] = quantize_weight(given["weight"])
    order = ("x", "weight", "weight_scale", "bias", "activation", "gate", "residual")
    return {name: given[name] for name in order}


def decode(**more: bool) -> dict[str, Any]:
    """A step's arguments, with the tensors of the block by their names."""
    case = GatedBlockDecodeCase(gate=(64,), **more)
    tensors, mask = case.tensors(), case.options()["mask"]
    spans = {"lo": mask.lo.reshape(-1), "hi": mask.hi.reshape(-1)}
    weights = dict(zip(TENSORS, case.weights(tensors).tensors(), strict=True))
    options = {"heads": case.heads, "scale": 0.25, "eps": [1e-5] * 3, "rms": [0] * 3, "activation": 1}
    return {name: tensors[name] for name in ("x", "k", "v")} | spans | weights | options


OPERATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    f"{operator}_{way}": lambda arguments=arguments, way=way: arguments(way == "bwd")
    for operator, arguments in {
        "masked_cross_attention": masked,
        "perceiver_attention": perceiver,
        "gated_residual": residual,
    }.items()
    for way in ("fwd", "bwd")
}
GATES = ("gate", "ff_gate")  # one element for all channels or one for each, in any layout
PARTS_OF_A_MASK = ("lo", "hi", "start", "stop", "media_lengths")


def call(operation: str, backend: str, arguments: dict[str, Any]) -> Any:
    if operation == DECODE:  # which takes the tensors of a block as a list
        step = {name: arguments[name] for name in arguments if name not in TENSORS}
        after = {name: step.pop(name) for name in ("heads", "scale", "eps", "rms", "activation")}
        arguments = step | {"weights": [arguments[name] for name in TENSORS]} | after
    return library.backends_of(operation)[backend](*arguments.values())


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor, tensor], dim=-1)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Every tensor in turn in another dtype, of other sizes, with fewer dimensions, and with gaps in it."""
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            yield name, "dtype", tensor.long()
            yield name, "sizes", longer(tensor)
            if name not in GATES:
                if tensor.shape[-1] > 1:
                    yield name, "sizes", tensor[..., :1]
                yield name, "dimensions", tensor[0]
                yield name, "strides", apart(tensor)


def assert_refused(operation: str, backend: str, arguments: dict[str, Any]) -> None:
    # what others are compared with: they are named in its place
    first = next(name for name in ("q", "x", "dz") if name in arguments)
    for name, what, tensor in wrong(arguments):
        if backend == "triton" and what == "strides" and tensor.ndim == 1 and tensor.is_floating_point():
            continue  # parameters have any layout there
        named = r"\w+" if name in (first, "k") else name.partition(".")[0]
        error = error_of(operation, backend, arguments | {name: tensor})
        assert re.match(rf"{operation}: expected .*\b{named}\b", error), f"{name} of other {what}: {error}"


def error_of(operation: str, backend: str, arguments: dict[str, Any]) -> str:
    try:
        call(operation, backend, arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "none"


@pytest.fixture(params=["triton", "cuda", "cpu"])
def each_kernel(request, running) -> str:
    return running(request.param)


@pytest.fixture(params=["cuda", "cpu"])  # whose messages are the same
def anywhere(request, running) -> str:
    return running(request.param)


@pytest.fixture(params=["triton", "cuda"])  # test_bindings.py checks those in C++
def gpu_kernels(request) -> str:
    available = available_backends("masked_cross_attention")[request.param]
    if available is not True:
        pytest.skip(f"{request.param}: {available}")
    return request.param


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_tensor_is_checked(operation, gpu_kernels):
    arguments = OPERATIONS[operation]()
    call(operation, gpu_kernels, arguments)
    assert_refused(operation, gpu_kernels, arguments)


@pytest.mark.parametrize("integers", [False, True])
def test_every_tensor_of_a_linear_layer_is_checked(integers, each_kernel):
    call("linear_fwd", each_kernel, linear(integers))
    assert_refused("linear_fwd", each_kernel, linear(integers))


@pytest.mark.parametrize("integers", [False, True])
def test_every_tensor_of_a_decoding_step_is_checked(integers, each_kernel):
    arguments = decode(bias=True, q_norm=True, glu=True, integers=integers)
    call(DECODE, each_kernel, arguments)
    assert_refused(DECODE, each_kernel, arguments)


@pytest.mark.parametrize("name", ["norm", "to_q", "to_out", "ff_norm", "up", "down"])
def test_what_a_decoding_step_lacks_is_named(name, anywhere):
    with pytest.raises(RuntimeError, match=f"^{DECODE}: expected a weight of {name}, got none"):
        call(DECODE, anywhere, decode() | {f"{name}.weight": torch.empty(0)})


def test_a_decoding_step_of_no_texts_has_the_dtype_of_others(anywhere):
    arguments = decode()
    for name in ("x", "k", "v", *(name for name in TENSORS if name not in GATES)):
        arguments[name] = arguments[name].bfloat16()
    none = {name: arguments[name][:0] for name in ("x", "k", "v", "lo", "hi")}
    found, empty = (call(DECODE, anywhere, arguments | texts) for texts in ({}, none))
    assert found.dtype == empty.dtype == torch.float32
    assert empty.shape == (0, 64)


def test_a_channel_by_itself_has_any_stride(kernels):
    strided = {name: torch.randn(3, 8, 2)[:, :1, 0] for name in ("x", "y")}
    whole = {name: tensor.contiguous() for name, tensor in strided.items()}
    assert strided["x"].stride() == (16, 2)
    gate = {"gate": torch.randn(1)}
    found, expected = (call("gated_residual_fwd", kernels, rows | gate) for rows in (strided, whole))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["to_q", "to_out", "up", "down"])
def test_a_matrix_of_a_decoding_step_is_one_piece(name, anywhere):
    arguments = decode()
    weight = arguments[f"{name}.weight"]
    with pytest.raises(RuntimeError, match=f"expected a contiguous {name}"):
        call(DECODE, anywhere, arguments | {f"{name}.weight": longer(weight)[:, : weight.shape[1]]})


@pytest.mark.parametrize("name", ["norm.bias", "gate", "ff_gate"])
def test_a_decoding_step_copies_no_parameter(name, anywhere):
    arguments = decode()
    with pytest.raises(RuntimeError, match=f"expected a contiguous {name.partition('.')[0]}"):
        call(DECODE, anywhere, arguments | {name: apart(arguments[name])})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 8}, r"to_q with shape \(128, 64\)"),
        ({"activation": 6}, r"activation from 0 to 5, got 6"),
        ({"activation": -1}, r"activation from 0 to 5, got -1"),
        ({"eps": [1e-5]}, "eps and rms of 3 norms"),
    ],
)
def test_the_numbers_of_a_decoding_step_are_checked(changed, message, anywhere):
    with pytest.raises(RuntimeError, match=f"^{DECODE}: expected {message}"):
        call(DECODE, anywhere, decode() | changed)


def test_more_columns_than_the_cuda_kernels_keep_are_refused(cuda):
    arguments = masked(backward=False)
    for name in "qkv":
        arguments[name] = torch.zeros(*arguments[name].shape[:-1], 136)
    with pytest.raises(RuntimeError, match="expected head_dim of at most 128, got 136"):
        call("masked_cross_attention_fwd", cuda, arguments)


def test_keys_on_another_device_are_refused():
    pytest.importorskip("triton")
    from flamingo_kernels.ops.masked_cross_attention.triton_fwd import masked_cross_attention_fwd

    arguments = masked(backward=False)
    with pytest.raises(ValueError, match="expected k on cpu with q, got meta"):
        masked_cross_attention_fwd(**arguments | {"k": arguments["k"].to("meta")})


def assert_as_clamped(
    operation: str, backend: str, arguments: dict[str, Any], clamped: dict[str, Any]
) -> None:
    """Spans that name what is not there read nothing of it; NaNs stand around every tensor."""
    floating = {
        name: lay_out(tensor, "slice")
        for name, tensor in arguments.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and name not in ("out", "softmax")
    }
    found = call(operation, backend, arguments | floating)
    expected = call(operation, backend, arguments | floating | clamped)
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return (
        outputs if isinstance(outputs, tuple) else tuple(outputs) if isinstance(outputs, list) else (outputs,)
    )


@pytest.mark.parametrize("immediate", [True, False])
def test_spans_beyond_the_media_are_cut(immediate, kernels):
    first = torch.tensor([[-FAR, -4, -1, 0, 2, 3, FAR - 1]]).repeat(2, 1)
    hi = first + 1 if immediate else torch.tensor([[FAR, 1, 2, 99, FAR, 4, FAR]]).repeat(2, 1)
    wild = {"lo": first.int(), "hi": hi.int()}
    clamped = {"lo": first.clamp(0, M).int(), "hi": hi.clamp(0, M).int()}
    rows = {"start": torch.full((2, M), -FAR), "stop": torch.full((2, M), FAR)}
    whole = {"start": torch.zeros(2, M), "stop": torch.full((2, M), T)}
    wild, clamped = (
        {name: span.int() for name, span in spans.items()} for spans in (wild | rows, clamped | whole)
    )
    assert_as_clamped(
        "masked_cross_attention_fwd", kernels, masked(False) | wild | {"immediate": immediate}, clamped
    )
    arguments = masked(backward=True) | {"immediate": immediate}
    forward = {name: arguments[name] for name in masked(backward=False)}
    arguments["out"], arguments["softmax"] = call("masked_cross_attention_fwd", kernels, forward | clamped)
    assert_as_clamped("masked_cross_attention_bwd", kernels, arguments | wild, clamped)


def test_no_row_is_left_unwritten(kernels):
    """Where a mask contradicts itself: rows see media of which it says that no row does."""
    arguments = masked(False) | {"immediate": True}
    medium = torch.arange(2 * T).view(2, T) % M
    none = torch.zeros(2, M).int()
    spans = {"lo": medium.int(), "hi": medium.int() + 1, "start": none, "stop": none}
    outputs = torch.stack([call("masked_cross_attention_fwd", kernels, arguments | spans)[0] for _ in "12"])
    assert outputs.isfinite().all()


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "attention" in name])
def test_no_latents_are_refused(operation, kernels):
    """A kernel would divide by their number."""
    arguments = OPERATIONS[operation]()
    for name in ("k", "v", "k_latents", "v_latents"):
        if name in arguments:
            arguments[name] = arguments[name][..., :0, :, :]
    error = error_of(operation, kernels, arguments)
    assert re.match(rf"{operation}: expected k\w* with at least one latent, got \(2, .*0, 2, 8\)\.", error)


def test_without_channels_there_is_nothing_to_add(kernels):
    arguments = {name: tensor[..., :0] for name, tensor in residual(backward=False).items()}
    assert call("gated_residual_fwd", kernels, arguments).shape == (3, 0)


@pytest.mark.parametrize("gates", [0, 1])
def test_without_channels_gradients_are_zero(gates, kernels):
    arguments = {"dz": torch.zeros(400, 0), "y": torch.zeros(400, 0), "gate": torch.ones(gates)}
    dy, dgate = call("gated_residual_bwd", kernels, arguments)
    assert dy.shape == (400, 0)
    assert torch.equal(dgate, torch.zeros(gates))


@pytest.mark.parametrize("operation", ["masked_cross_attention_bwd", "perceiver_attention_bwd"])
def test_delta_is_summed_in_double(operation, kernels):
    """delta = sum(dout * out) of a row.

    With queries and values of 0 and keys of 1, dq is -delta times the scale.
    """
    arguments = OPERATIONS[operation]()
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and name != "softmax":
            fill = torch.ones_like if name.startswith(("k", "dout")) else torch.zeros_like
            arguments[name] = fill(tensor).repeat(*[1] * (tensor.ndim - 1), 6)  # 48 channels
    arguments["out"][..., 0], arguments["out"][..., 16], arguments["out"][..., 32] = 1e9, 1.0, -1e9
    if operation == "masked_cross_attention_bwd":
        none, count = torch.zeros(2, T).int(), torch.full((2,), M * 5)
        rows = {"start": torch.zeros(2, M).int(), "stop": torch.full((2, M), T).int()}
        arguments |= {"lo": none, "hi": none + M} | rows
    else:
        count = arguments["media_lengths"] + 3
    softmax = torch.zeros_like(arguments["softmax"])
    softmax[1] = count[:, None, None]
    dq, *_ = call(operation, kernels, arguments | {"softmax": softmax})
    torch.testing.assert_close(dq, torch.full_like(dq, -0.5))


def test_lengths_beyond_the_features_are_cut(kernels):
    wild, clamped = ({"media_lengths": torch.tensor(n).int()} for n in ([-FAR, FAR], [0, S]))
    assert_as_clamped("perceiver_attention_fwd", kernels, perceiver(backward=False) | wild, clamped)
    arguments = perceiver(backward=True)
    forward = {name: arguments[name] for name in perceiver(backward=False)}
    arguments["out"], arguments["softmax"] = call("perceiver_attention_fwd", kernels, forward | clamped)
    assert_as_clamped("perceiver_attention_bwd", kernels, arguments | wild, clamped)


def test_spans_of_a_decoding_step_beyond_its_media_are_cut(anywhere):
    wild = {"lo": torch.tensor([-FAR, 1]).int(), "hi": torch.tensor([2, FAR]).int()}
    clamped = {"lo": torch.tensor([0, 1]).int(), "hi": torch.tensor([2, 3]).int()}
    arguments = decode()
    for name in "kv":
        arguments[name] = lay_out(arguments[name], "slice")
    found, expected = (call(DECODE, anywhere, arguments | spans) for spans in (wild, clamped))
    assert torch.equal(found, expected)
    assert found.isfinite().all()
