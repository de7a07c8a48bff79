"""The C++ operations called bare, as anybody can: what they check, what they say without memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flamingo_kernels import MediaMask
from flamingo_kernels._backends import library
from tests.helpers import ROOT

# A step's tensors come in a list, see test_raw_calls.py.
OPERATIONS = [name for name in library.operations() if name != "gated_block_decode_fwd"]
B, T, M, R, H, HKV, D = 2, 5, 3, 4, 4, 2, 8
NO_HEADS = "expected the 4 heads of q to be a multiple of the heads of the keys, got 0."
OWN_DTYPE = ("x", "y", "residual", "gate", "bias")  # it need not be that of the first tensor
PARAMETERS = ("gate", "weight", "bias")  # of the same size without rows


def call(name: str, **changed):
    arguments = ARGUMENTS[name] | changed
    return library.backends_of(name)["cpu"](**arguments)


def _masked(immediate: bool) -> tuple[dict, dict]:
    times = torch.tensor([[0, 1, 2, 3, 3], [1, 1, 2, 0, 0]])
    mask = MediaMask.from_text_time(times, M, immediate=immediate)
    k, v = torch.randn(2, B, M, R, HKV, D)
    spans = {"lo": mask.lo, "hi": mask.hi, "start": mask.start, "stop": mask.stop}
    fwd = {"q": torch.randn(B, T, H, D), "k": k, "v": v} | spans
    fwd |= {"immediate": immediate, "averages": False, "scale": 0.5}
    out, softmax = library.backends_of("masked_cross_attention_fwd")["cpu"](**fwd)
    return fwd, {"dout": torch.randn_like(out), **fwd, "out": out, "softmax": softmax}


def _perceiver() -> tuple[dict, dict]:
    media, latents = torch.randn(2, B, 6, HKV, D), torch.randn(2, B, 3, HKV, D)
    fwd = {"q": torch.randn(B, 3, H, D), "k_media": media[0], "v_media": media[1]}
    fwd |= {"k_latents": latents[0], "v_latents": latents[1]}
    fwd |= {"media_lengths": torch.tensor([6, 2], dtype=torch.int32), "scale": 0.5}
    out, softmax = library.backends_of("perceiver_attention_fwd")["cpu"](**fwd)
    return fwd, {"dout": torch.randn_like(out), **fwd, "out": out, "softmax": softmax}


def _residual() -> tuple[dict, dict]:
    x, y, dz = torch.randn(3, T, D)
    gate = torch.randn(D)
    return {"x": x, "y": y, "gate": gate}, {"dz": dz, "y": y, "gate": gate}


def _linear() -> dict:
    x, weight, bias, residual = torch.randn(3, T), torch.randn(D, T), torch.randn(D), torch.randn(3, D)
    fwd = {"x": x, "weight": weight, "weight_scale": None, "bias": bias, "activation": 1}
    return fwd | {"gate": torch.randn(D), "residual": residual}


def _integers() -> dict:
    return {"weight": torch.ones(D, T, dtype=torch.int8), "weight_scale": torch.ones(D)}


ARGUMENTS: dict[str, dict] = {}


@pytest.fixture(autouse=True)
def good_arguments(compiled):
    made = {
        "masked_cross_attention": _masked(False),
        "perceiver_attention": _perceiver(),
        "gated_residual": _residual(),
    }
    for operator, (fwd, bwd) in made.items():
        ARGUMENTS.update({f"{operator}_fwd": fwd, f"{operator}_bwd": bwd})
    ARGUMENTS["linear_fwd"] = _linear()


def _tensors() -> list[tuple[str, str]]:
    """Every tensor of every operation."""
    return [
        (operation, argument.name)
        for operation in OPERATIONS
        for argument in library.backends_of(operation)["cpu"]._schema.arguments
        if "Tensor" in str(argument.type) and argument.name != "weight_scale"
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_good_arguments_are_taken(operation):
    call(operation)


@pytest.mark.parametrize(("operation", "name"), _tensors())
def test_a_tensor_in_a_wrong_dtype_is_refused(operation, name):
    tensor = ARGUMENTS[operation][name]
    wrong = [tensor.double() if tensor.is_floating_point() else tensor.long()]
    if name not in OWN_DTYPE and tensor.is_floating_point():
        wrong.append(tensor.bfloat16())
    named = r"\w+" if name == "q" else name  # the others are to be like q
    for other in wrong:
        with pytest.raises(RuntimeError, match=rf"^{operation}: expected {named} in \w+.*, got \w+\.$"):
            call(operation, **{name: other})


@pytest.mark.parametrize(("operation", "name"), _tensors())
def test_a_tensor_of_wrong_sizes_is_refused(operation, name):
    tensor = ARGUMENTS[operation][name]
    for dim in range(tensor.ndim):
        if (operation, name, dim) == ("perceiver_attention_fwd", "q", 1):
            continue  # any number of rows will do
        with pytest.raises(RuntimeError, match=rf"^{operation}: expected .*, got "):
            call(operation, **{name: tensor.narrow(dim, 0, tensor.shape[dim] - 1)})
    others = [torch.stack([tensor, tensor])]
    if name == "bias":  # one element is a gate's for all channels
        others.append(tensor[:1])
    for other in others:
        with pytest.raises(RuntimeError, match=rf"^{operation}: expected .*, got .*\("):
            call(operation, **{name: other})


@pytest.mark.parametrize(("operation", "name"), _tensors())
def test_a_tensor_with_strides_that_no_kernel_takes_is_refused(operation, name):
    tensor = ARGUMENTS[operation][name]
    strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
    if name == "gate":
        call(operation, **{name: strided})
        return
    with pytest.raises(RuntimeError, match=rf"^{operation}: expected .*contiguous.*, got strides \(.*2\)\."):
        call(operation, **{name: strided})


@pytest.mark.parametrize("activation", [-1, 6, 2**31])
def test_an_activation_that_there_is_not_is_refused(activation):
    with pytest.raises(
        RuntimeError, match=rf"^linear_fwd: expected activation from 0 to 5, got {activation}\."
    ):
        call("linear_fwd", activation=activation)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(D, T)}, "expected weight in Char, got Float."),
        ({"weight": torch.ones(D, T, dtype=torch.uint8)}, "expected weight in Char, got Byte."),
        (
            {"weight": torch.ones(D, T - 1, dtype=torch.int8)},
            "expected weight with shape (8, 5), got (8, 4).",
        ),
        (
            {"weight": torch.ones(T, D, dtype=torch.int8).t()},
            "expected weight with a contiguous last dimension",
        ),
        ({"weight_scale": torch.ones(D).double()}, "expected weight_scale in Float, got Double."),
        ({"weight_scale": torch.ones(D).half()}, "expected weight_scale in Float, got Half."),
        ({"weight_scale": torch.ones(D - 1)}, "expected weight_scale with shape (8), got (7)."),
        ({"weight_scale": torch.ones(1)}, "expected weight_scale with shape (8), got (1)."),
        ({"weight_scale": torch.ones(D, 2)[:, 0]}, "expected a contiguous weight_scale"),
        ({"weight_scale": None}, "expected weight in Float, BFloat16 or Half, got Char."),
    ],
)
def test_integers_and_their_scales_are_checked(changed, message):
    call("linear_fwd", **_integers())
    with pytest.raises(RuntimeError) as error:
        call("linear_fwd", **_integers() | changed)
    assert str(error.value).startswith(f"linear_fwd: {message}")


def test_the_message_names_operation_tensor_expected_and_got():
    k = ARGUMENTS["masked_cross_attention_fwd"]["k"]
    for changed, message in (
        ({"k": k.half()}, "expected k in Float like q, got Half."),
        ({"k": k[:, :2]}, "expected v with shape (2, 2, 4, 2, 8), got (2, 3, 4, 2, 8)."),
        ({"k": k[0]}, "expected k with 5 dimensions, got (3, 4, 2, 8)."),
        ({"k": k[..., :0, :], "v": k[..., :0, :]}, NO_HEADS),
    ):
        with pytest.raises(RuntimeError) as caught:
            call("masked_cross_attention_fwd", **changed)
        assert str(caught.value).splitlines()[0] == f"masked_cross_attention_fwd: {message}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_narrower_than_the_branch_is_refused(dtype):
    """A kernel would read the branch in the gradient's dtype."""
    dz = ARGUMENTS["gated_residual_bwd"]["dz"].to(dtype)
    with pytest.raises(
        RuntimeError, match=r"^gated_residual_bwd: expected dz in Float or in Float like y, got"
    ):
        call("gated_residual_bwd", dz=dz)


@pytest.mark.parametrize("immediate", [True, False])
def test_rows_outside_the_text_are_none(immediate):
    """Whatever numbers stand in a mask, nothing outside the tensors is read or written."""
    fwd, bwd = _masked(immediate)
    ARGUMENTS.update({"masked_cross_attention_fwd": fwd, "masked_cross_attention_bwd": bwd})
    everywhere = {"start": torch.zeros_like(fwd["start"]), "stop": torch.full_like(fwd["stop"], T)}
    beyond = {"start": everywhere["start"] - 2**31, "stop": everywhere["stop"] + 1000}
    for operation in ("masked_cross_attention_fwd", "masked_cross_attention_bwd"):
        for found, expected in zip(call(operation, **beyond), call(operation, **everywhere), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("operation", ["perceiver_attention_fwd", "perceiver_attention_bwd"])
def test_lengths_are_between_none_and_all(operation):
    beyond = torch.tensor([1000, -(2**31)], dtype=torch.int32)
    expected = call(operation, media_lengths=torch.tensor([6, 0], dtype=torch.int32))
    assert all(map(torch.equal, call(operation, media_lengths=beyond), expected))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_tensors_have_any_strides(operation):
    """As what `.sum().backward()` of an empty output sends, all of whose strides are 0."""
    changed = {}
    for name, tensor in ARGUMENTS[operation].items():
        if isinstance(tensor, torch.Tensor):
            batch = 1 if name == "softmax" else 0
            whole = tensor if name in PARAMETERS else tensor.narrow(batch, 0, 0)
            changed[name] = whole if name in PARAMETERS else whole.new_zeros(()).expand(whole.shape)
    results = call(operation, **changed)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.numel() == 0 or not result.any()


# A child limits its memory to what it has in use and a little more.
WITHOUT_MEMORY = """
import resource, sys
import torch
from flamingo_kernels import MediaMask
from flamingo_kernels._backends import library

torch.set_num_threads(1)
calls = {
    "perceiver_attention_bwd": lambda: [
        *[rows := torch.zeros(1, 8000, 8, 256, dtype=torch.bfloat16)] * 2,
        *[torch.zeros(1, 4, 1, 256, dtype=torch.bfloat16)] * 4,
        *(rows, torch.ones(2, 1, 8, 8000), None, 1.0),
    ],
    "gated_residual_bwd": lambda: [*[torch.zeros(1, 1 << 19).expand(64, -1)] * 2, torch.zeros(1 << 19)],
    "gated_residual_fwd": lambda: [*[torch.zeros(1, 1 << 19).expand(64, -1)] * 2, torch.zeros(1)],
    "linear_fwd": lambda: [*[torch.zeros(1, 1 << 19).expand(64, -1)] * 2, None, None, 0, None, None],
}
name, mebibytes = sys.argv[1:]
run, arguments = library.backends_of(name)["cpu"], calls[name]()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(mebibytes) * 2**20, -1))
try:
    run(*arguments)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="no /proc, which says what memory is in use"
)
@pytest.mark.parametrize(
    ("operation", "mebibytes", "what", "wanted"),
    [
        ("perceiver_attention_bwd", 60, "working memory", 8 * 8000 * 256 * 4),
        ("gated_residual_bwd", 190, "partial sums", 64 * 2**19 * 4),
        ("gated_residual_fwd", 60, "a result", 64 * 2**19 * 4),
        ("linear_fwd", 60, "working memory", 64 * 2**19 * 4),
    ],
)
def test_without_memory_there_is_an_error_that_says_how_much(operation, mebibytes, what, wanted):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, operation, str(mebibytes)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    said, _, rest = done.stdout.partition(" bytes for ")
    start = f"{operation}: out of memory, expected "
    assert said.startswith(start), done.stdout + done.stderr
    assert wanted <= int(said.removeprefix(start)) < 1.2 * wanted
    assert rest == f"{what}, got none; use a smaller batch or fewer threads.\n"
