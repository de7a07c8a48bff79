"""linear against float64 by every product, and which product it takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_kernels import UnsupportedError, available_backends, linear, use_backend
from flamingo_kernels._backends import cpu, dispatch
from flamingo_kernels.ops.linear import api, config, products
from flamingo_kernels.ops.linear.products import PRODUCTS
from flamingo_kernels.ops.linear.schema import ACTIVATIONS, FWD
from flamingo_kernels.testing import DTYPES, assert_within_budget, lay_out
from flamingo_kernels.testing import LinearCase as Case
from tests.flamingo_kernels.ops.conftest import OTHERS
from tests.helpers import ROOT
from tests.helpers.same import assert_same

LIBRARIES = ["mkl", "onednn"]
ROWS = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33]
HALVES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True)
class Inference(Case):
    """Without gradients the kernel does what follows its product too."""

    differentiable: ClassVar[bool] = False


EVERYTHING = {"activation": "gelu", "residual": True, "gate": (24,)}
CASES = [
    *(kind(rows=(rows,)) for rows in ROWS for kind in (Case, Inference)),
    *(Inference(rows=(rows,), width=1040, out=37) for rows in (1, 2, 3, 7, 13, 18)),
    *(Inference(width=width, out=5) for width in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)),
    *(Inference(width=width, out=3) for width in (511, 512, 513, 1023, 1024, 1025, 2100)),
    *(Inference(out=out) for out in (0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 70)),
    *(kind(activation=each) for each in ACTIVATIONS[1:] for kind in (Case, Inference)),
    *(
        kind(gate=gate, residual=residual)
        for gate in ((), (1,), (24,), (1, 1, 24))
        for residual in (True, False)
        for kind in (Case, Inference)
    ),
    *(kind(bias=False) for kind in (Case, Inference)),
    *(kind(rows=rows, **EVERYTHING) for rows in ((), (0, 2), (2, 1, 3)) for kind in (Case, Inference)),
    *(
        kind(rows=(3, 5), layout=layout, **EVERYTHING)
        for layout in ("slice", "transposed", "strided", "expanded")
        for kind in (Case, Inference)
    ),
    Case(rows=(0,), **EVERYTHING),
    Case(width=0, **EVERYTHING),
    Case(rows=(33,), width=130, out=65, activation="silu", residual=True, gate=(65,)),
]
# The residual's and the gate's.
MIXES = [(a, b) for a in DTYPES for b in DTYPES]


@pytest.fixture(params=["reference", "triton", "cuda", "cpu", *OTHERS, *LIBRARIES])
def backend(request, running, select_variant) -> str:
    return _select(request.param, running, select_variant)


@pytest.fixture(params=["triton", "cuda", "cpu", *OTHERS])
def kernels(request, running, select_variant) -> str:
    return _select(request.param, running, select_variant)


def _select(name, running, select_variant) -> str:
    backend, _, variant = name.partition(", ")
    if backend in LIBRARIES:
        if (available := available_backends("linear")[backend]) is not True:
            pytest.skip(f"{backend}: {available}")
        return backend
    running(backend)
    if variant:
        select_variant(variant)
    return backend


def skip_unless_it_takes(dtype: torch.dtype, backend: str) -> None:
    """Not every library has products in every dtype on every processor."""
    if backend in LIBRARIES and (why := PRODUCTS[backend].why_not(dtype)):
        pytest.skip(f"{backend}: {why}")


@pytest.fixture
def measured(monkeypatch):
    """Has a call choose as if this had been measured, for a weight of any size."""

    def stand_in(forward="torch", dx="torch", dw="torch"):
        ways = {"forward": [[1000, forward]], "dx": [[1000, dx]], "dw": [[1000, dw]]}
        monkeypatch.setattr(config, "table", lambda: {str(dtype)[6:]: ways for dtype in DTYPES})
        monkeypatch.setattr(config, "LEAST_WEIGHTS", 0)
        config.choose.cache_clear()

    yield stand_in
    config.choose.cache_clear()


@pytest.fixture(params=LIBRARIES)
def library(request) -> str:
    if (available := available_backends("linear")[request.param]) is not True:
        pytest.skip(f"{request.param}: {available}")
    return request.param


class Ran(TorchDispatchMode):
    """Which products ran in the block, by the names of their operations."""

    NAMES = {
        "linear_fwd.default": "cpu",
        "linear_fwd.cuda": "cuda",
        "linear_fwd.triton": "triton",
        "_linear_pointwise.default": "onednn",
        "mm.default": "torch",
        "addmm.default": "torch",
    }

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = f"{function.overloadpacket.__name__}.{function._overloadname}"
        if name in self.NAMES:
            self.products.append(self.NAMES[name])
        return function(*args, **(kwargs or {}))


def inputs(rows=3, width=40, out=24, dtype=torch.float32):
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


# results


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case}")
def test_oracle(case, dtype, backend):
    skip_unless_it_takes(dtype, backend)
    assert_within_budget(replace(case, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("gate", [None, (), (1,), (24,), (1, 24)], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))
@pytest.mark.parametrize("kind", [Case, Inference])
def test_oracle_of_mixed_dtypes(kind, mix, gate, dtype, compiled):
    """Dtypes, too, are those of `residual + tanh(gate) * y`: the budget compares them first."""
    residual, alpha = mix
    case = kind(
        dtype=dtype, activation="silu", residual=True, residual_dtype=residual, gate=gate, gate_dtype=alpha
    )
    assert_within_budget(case, compiled)


@pytest.mark.parametrize("gate", [(), (1,), (24,)], ids=str)
@pytest.mark.parametrize("gate_dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_gate_without_residual_gives_torchs_dtype(dtype, gate_dtype, gate, compiled):
    assert_within_budget(Inference(dtype=dtype, gate=gate, gate_dtype=gate_dtype), compiled)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_gradcheck_of_the_reference(activation):
    case = Case(rows=(3,), width=5, out=4, activation=activation, residual=True, gate=(4,))
    names, tensors = zip(*case.tensors().items(), strict=True)

    def run(*tensors):
        return case.kernel("reference", **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, [tensor.double().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_row_is_the_same_among_any_number_of_others(dtype, kernels):
    """On a GPU of up to 16: for more the kernels take other tiles."""
    most = 40 if kernels.startswith("cpu") else 16
    x, weight, bias = inputs(most, 1100, 37, dtype)
    alone = torch.cat([linear(row[None], weight, bias, backend=kernels) for row in x])
    for rows in range(1, most + 1):
        assert torch.equal(linear(x[:rows], weight, bias, backend=kernels), alone[:rows]), rows
        assert torch.equal(linear(x[-rows:], weight, bias, backend=kernels), alone[-rows:]), rows


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_threads_and_repeats_change_nothing(dtype, rows, kernels, set_threads):
    tensors = Case(rows=(rows,), width=1100, out=333, dtype=dtype, residual=True, gate=(333,)).tensors()
    set_threads(1)
    expected = linear(**tensors, activation="gelu", backend=kernels)
    for threads in (2, 4, 4, 3) if kernels.startswith("cpu") else (2,):
        set_threads(threads)
        assert torch.equal(linear(**tensors, activation="gelu", backend=kernels), expected)
        assert cpu.threads_of_latest_run() == threads or not kernels.startswith("cpu")


@pytest.mark.parametrize("layout", ["slice", "strided", "by columns"])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "gate"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_each_tensor_has_strides_of_its_own(dtype, rows, name, layout, kernels):
    """NaN lies behind every row of a slice."""
    tensors = Case(rows=(rows,), dtype=dtype, residual=True, gate=(24,)).tensors()
    expected = linear(**tensors, backend=kernels)
    by_columns = layout == "by columns" and tensors[name].ndim == 2
    tensors[name] = tensors[name].t().contiguous().t() if by_columns else lay_out(tensors[name], layout)
    found = linear(**tensors, backend=kernels)
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(2, 17), (0, 0), (4, 39)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_nan_and_infinity_of_x_stay_in_their_row(dtype, place, value, kernels):
    tensors = Case(rows=(5,), dtype=dtype, residual=True, gate=(24,)).tensors()
    clean = linear(**tensors, backend=kernels)
    tensors["x"][place] = value
    found = linear(**tensors, backend=kernels)
    assert not found[place[0]].isfinite().any()
    others = torch.arange(5) != place[0]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["weight", "bias", "gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_nan_and_infinity_of_a_parameter_stay_in_their_output(dtype, name, value, kernels):
    tensors = Case(rows=(5,), dtype=dtype, residual=True, gate=(24,)).tensors()
    clean = linear(**tensors, backend=kernels)
    tensors[name][(21, 39) if name == "weight" else 21] = value
    found = linear(**tensors, backend=kernels)
    others = torch.arange(24) != 21
    assert torch.equal(found[:, others], clean[:, others])
    if (name, value) != ("gate", torch.inf):  # whose tanh is 1
        assert not found[:, 21].isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_of_a_residual_stay_in_their_element(value, kernels):
    tensors = Case(rows=(5,), residual=True).tensors()
    clean = linear(**tensors, backend=kernels)
    tensors["residual"][3, 23] = value
    found = linear(**tensors, backend=kernels)
    here = torch.zeros(5, 24, dtype=torch.bool)
    here[3, 23] = True
    assert (~found.isfinite()).equal(here)
    assert torch.equal(found[~here], clean[~here])


FAR = [0.0, -0.0, 1e-3, -1e-3, 9.0, -9.0, 100.0, -100.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_far_out_are_torchs(activation, dtype, kernels):
    """NaN where torch has one, as relu keeps it and -inf times a share of 0 is one."""
    y = torch.tensor(FAR, dtype=dtype)[:, None]
    found = linear(y, torch.ones(1, 1, dtype=dtype), activation=activation, backend=kernels)
    exact = linear(y.double(), torch.ones(1, 1).double(), activation=activation, backend="reference")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact.to(dtype), rtol=2 * eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("size", [1e-3, 1.0, 6.0])
def test_activations_have_floats_precision_everywhere(size, activation, kernels):
    y = torch.linspace(-size, size, 1001)
    ones = torch.ones(1, 1)
    found = linear(y[:, None], ones, activation=activation, backend=kernels)[:, 0].double()
    exact = linear(y[:, None].double(), ones.double(), activation=activation, backend="reference")[:, 0]
    assert ((found - exact).abs() <= 3e-7 * y.double().abs().maximum(exact.abs())).all()


def test_what_gelu_leaves_of_negative_numbers_is_no_difference(kernels):
    """One minus a number near one would leave whole multiples of 2^-24, and 0 below -6."""
    y = torch.linspace(-10, -3, 101)
    found = linear(y[:, None], torch.ones(1, 1), activation="gelu", backend=kernels)[:, 0]
    exact = y.double() * torch.special.erfc(-y.double() / 2**0.5) / 2
    torch.testing.assert_close(found.double(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 100.0, -100.0])
def test_a_saturated_gate(value, backend):
    tensors = inputs()
    residual, y = torch.randn(3, 24), linear(*tensors, backend=backend)
    found = linear(*tensors, residual=residual, gate=torch.tensor([value]), backend=backend)
    torch.testing.assert_close(found, residual + math.copysign(1, value) * y)


def test_a_closed_gate_passes_the_residual_on(backend):
    residual = torch.randn(3, 24)
    found = linear(*inputs(), activation="gelu", residual=residual, gate=torch.zeros(1), backend=backend)
    assert torch.equal(found, residual)


def test_subnormal_weights_of_float16_count(kernels):
    """The least is 2^-24; sums of them are exact here."""
    weight = torch.arange(-32, 32).view(2, 32).half() * 2.0**-24
    x = torch.full((3, 32), 2.0**10).half()
    found = linear(x, weight, backend=kernels)
    assert weight.any()
    assert torch.equal(found, (x.double() @ weight.double().t()).half())


def test_long_sums_are_made_of_short_ones(kernels):
    """A float that grows to 13000 in steps of a tenth loses 6e-5 of it."""
    x, weight = torch.ones(1, 2**17), torch.full((1, 2**17), 0.1)
    exact = weight.double().sum().item()
    assert abs(linear(x, weight, backend=kernels).item() - exact) <= 1e-5 * exact


def test_half_dtypes_are_summed_in_float32_and_rounded_once(kernels):
    for dtype in HALVES:
        x, weight = torch.ones(2, 4096, dtype=dtype), torch.ones(3, 4096, dtype=dtype)
        weight[:, 0] = 2.0**-6
        found = linear(x, weight, residual=torch.full((2, 3), -4095.0), backend=kernels)
        assert torch.equal(found, torch.full((2, 3), 2.0**-6))


def test_an_open_gate_is_as_none(backend):
    tensors = inputs()
    found = linear(*tensors, gate=torch.full((24,), torch.inf), backend=backend)
    assert torch.equal(found, linear(*tensors, backend=backend))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_result_is_contiguous_whatever_its_residual_is(needs_grad, backend):
    residual = torch.randn(24, 3).t().requires_grad_(needs_grad)
    assert linear(*inputs(), residual=residual, backend=backend).is_contiguous()


# gradients


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")])
def test_frozen_tensors_cost_no_product_and_keep_nothing(frozen, backend):
    leaves = dict(zip(("x", "weight", "bias"), inputs(), strict=True))
    saved = []
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = linear(**leaves, backend=backend)
    assert (leaves["x"].data_ptr() in saved) == ("weight" not in frozen)
    with Ran() as ran:
        y.sum().backward()
    assert len(ran.products) == 2 - len({"x", "weight"} & set(frozen))
    assert all((leaf.grad is None) == (name in frozen) for name, leaf in leaves.items())


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed", "slice"])
def test_a_gradient_may_have_any_strides(layout, backend):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    y = linear(leaves[0].view(3, 1, 40).expand(3, 2, 40), *leaves[1:], backend=backend)
    dout = lay_out(torch.randn(3, 2, 24), layout)
    found, expected = (
        torch.autograd.grad(y, leaves, each, retain_graph=True) for each in (dout, dout.contiguous())
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_gradients_nothing_is_kept(backend):
    x, weight, bias = inputs()
    with torch.no_grad():
        assert linear(x, weight.requires_grad_(), bias, backend=backend).grad_fn is None
    assert linear(x, weight.detach(), bias, backend=backend).grad_fn is None


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_second_derivatives_are_torchs(activation, backend):
    seconds = []
    case = Case(rows=(3,), width=5, out=4, activation=activation, residual=True, gate=(4,))
    for run in (case.eager, lambda **t: case.kernel(backend, **t)):
        leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
        (out,) = run(**leaves)
        firsts = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        penalty = sum(first.square().sum() for first in firsts)
        seconds.append(torch.autograd.grad(penalty, list(leaves.values())))
    assert all(second.any() for second in seconds[0])
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-4, atol=1e-4)


def test_a_batch_of_gradients(backend):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    y, douts = linear(*leaves, backend=backend), torch.randn(4, 3, 24)
    found = torch.autograd.grad(y, leaves, douts, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, dout, retain_graph=True) for dout in douts]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))))


# autocast, transforms, compilers


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("given", [*DTYPES, torch.float64], ids=str)
def test_autocast_gives_the_dtype_of_torchs(given, dtype, backend):
    if given == torch.float64 and backend != "reference":
        pytest.skip("autocast leaves float64, which the reference alone takes")
    skip_unless_it_takes(dtype, backend)
    tensors = inputs(dtype=given)
    with torch.autocast("cpu", dtype):
        expected, found = F.linear(*tensors), linear(*tensors, backend=backend)
        with_residual = linear(*tensors, residual=torch.randn(3, 24), backend=backend)
    assert found.dtype == expected.dtype
    assert with_residual.dtype == torch.promote_types(expected.dtype, torch.float32)
    cast = tensors if given == torch.float64 else [tensor.to(dtype) for tensor in tensors]
    assert torch.equal(found, linear(*cast, backend=backend))


def test_gradients_under_autocast_have_the_dtypes_of_their_tensors(backend):
    skip_unless_it_takes(torch.bfloat16, backend)
    leaves, dout = [tensor.requires_grad_() for tensor in inputs()], torch.randn(3, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(*leaves, backend=backend)
    cast = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(linear(*cast, backend=backend), cast, dout)
    for one, other in zip(torch.autograd.grad(y, leaves, dout), expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


def test_auto_takes_what_was_measured_under_autocast_too(measured, compiled):
    measured("cpu")
    with torch.autocast("cpu", torch.bfloat16), Ran() as ran:
        linear(*inputs())
    assert ran.products == ["cpu"]


def total(x, weight, bias, backend="auto"):
    return linear(x, weight, bias, activation="gelu", backend=backend).square().sum()


def dual(x, weight, bias, backend="auto"):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(linear(x, weight, bias, activation="gelu", backend=backend)).tangent


TRANSFORMS = {
    "grad": lambda *t, **o: grad(lambda *t: total(*t, **o), argnums=(0, 1, 2))(*t),
    "vmap": lambda x, *t, **o: vmap(lambda row: linear(row, *t, activation="gelu", **o))(x),
    "vmap of grad": lambda x, *t, **o: vmap(grad(lambda row: total(row, *t, **o)))(x),
    "dual": dual,
}


@pytest.mark.parametrize("way", ["cpu", "onednn", "mkl"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_auto_is_torchs_product_under_a_transform(transform, way, measured):
    expected = TRANSFORMS[transform](*inputs(), backend="reference")
    torch.manual_seed(0)
    measured(way, way if way != "cpu" else "torch")
    tensors = inputs()
    with Ran() as ran:
        TRANSFORMS[transform](*tensors)
    assert {"cpu", "onednn"}.isdisjoint(ran.products)
    torch.manual_seed(0)
    torch.testing.assert_close(TRANSFORMS[transform](*inputs()), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_product_that_is_asked_for_refuses_a_transform(transform, backend):
    if backend == "reference":
        pytest.skip("it computes under every transform")
    why = "forward-mode differentiation" if transform == "dual" else "a transform of torch.func"
    with pytest.raises(UnsupportedError, match=f'backend="{backend}" was requested but {why}'):
        TRANSFORMS[transform](*inputs(), backend=backend)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("asked", ["auto", "cpu", "reference"])
def test_compiled(asked, needs_grad, measured, running):
    if asked == "cpu":
        running("cpu")
    measured("cpu", "onednn", "onednn")
    torch._dynamo.reset()
    case = Case(rows=(3,), **EVERYTHING)
    leaves = {name: tensor.requires_grad_(needs_grad) for name, tensor in case.tensors().items()}
    compiled = torch.compile(lambda **t: case.kernel(asked, **t)[0], fullgraph=True, backend="aot_eager")
    found, expected = compiled(**leaves), case.kernel("reference", **leaves)[0]
    torch.testing.assert_close(found, expected)
    if needs_grad:
        grads = [torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_library_is_refused_under_a_compiler(library):
    if torch.__version__ < "2.11":
        pytest.skip("torch 2.10 fails in its own code where an error is raised in a traced call")
    torch._dynamo.reset()
    tensors = inputs()
    compiled = torch.compile(lambda *t: linear(*t, backend=library), backend="eager")
    with pytest.raises(UnsupportedError, match="a compiler chooses the libraries of its products itself"):
        compiled(*tensors)
    torch._dynamo.reset()


# which product


def test_an_explicit_backend_never_falls_back(library):
    tensors = inputs(dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=rf'backend="{library}" was requested but .*float64') as caught:
        linear(*tensors, backend=library)
    assert list(caught.value.reasons) == [library]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mkl_has_float32_alone(dtype):
    if available_backends("linear")["mkl"] is not True:
        pytest.skip("torch is built without MKL")
    with pytest.raises(
        UnsupportedError, match=f'"mkl" was requested but torch gives it no product in {dtype}'
    ):
        linear(*inputs(dtype=dtype), backend="mkl")


def test_each_backend_runs_its_own_products(backend, measured):
    measured("onednn", "torch", "torch")
    products._has_onednn()  # which it tries once
    forward, backward = {
        "cpu": ("cpu", "torch"),
        "cuda": ("cuda", "torch"),
        "triton": ("triton", "torch"),
        "onednn": ("onednn", "onednn"),
    }.get(backend, ("torch", "torch"))
    with Ran() as ran:
        linear(*inputs(), backend=backend)
    assert ran.products == [forward]
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    with Ran() as ran:
        torch.autograd.grad(linear(*leaves, backend=backend).sum(), leaves)
    assert ran.products == [forward, backward, backward]


def test_the_context_chooses_a_product(compiled):
    with use_backend("cpu"), Ran() as ran:
        linear(*inputs())
    with use_backend("reference"), Ran() as by_torch:
        linear(*inputs())
    assert (ran.products, by_torch.products) == (["cpu"], ["torch"])


def test_auto_takes_what_was_measured(measured, compiled):
    if available_backends("linear")["onednn"] is not True:
        pytest.skip("torch has no oneDNN")
    for forward, dx, dw in (
        ("cpu", "onednn", "torch"),
        ("onednn", "torch", "onednn"),
        ("torch", "onednn", "mkl"),
    ):
        measured(forward, dx, dw)
        shown = ["torch" if name == "mkl" else name for name in (forward, dx, dw)]
        for call in (linear, api.multiply):
            with Ran() as ran:
                call(*inputs())
            assert ran.products == shown[:1]
            leaves = [tensor.requires_grad_() for tensor in inputs()]
            with Ran() as ran:
                y = call(*leaves)
                found = torch.autograd.grad(y.sum(), leaves)
            assert ran.products == shown
            torch.testing.assert_close(found, torch.autograd.grad(F.linear(*leaves).sum(), leaves))


def test_a_transposed_weight_is_torchs(measured, compiled):
    """The kernel would copy it in every call."""
    measured("cpu")
    x, weight, _ = inputs()
    for call in (linear, api.multiply):
        with Ran() as ran:
            call(x, weight.t().contiguous().t())
        assert ran.products == ["torch"]


def test_mkl_is_called_where_it_was_measured(measured, monkeypatch):
    if available_backends("linear")["mkl"] is not True:
        pytest.skip("torch is built without MKL")
    called = []
    forward = PRODUCTS["mkl"].forward
    spy = PRODUCTS["mkl"]._replace(forward=lambda *t: called.append("mkl") or forward(*t))
    monkeypatch.setitem(PRODUCTS, "mkl", spy)
    measured("mkl")
    linear(*inputs())
    assert called == ["mkl"]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        linear(*inputs())
        assert called == ["mkl"]
        with pytest.raises(UnsupportedError, match="set_float32_matmul_precision asks for less"):
            linear(*inputs(), backend="mkl")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_torchs_switch_of_onednn_is_heeded(measured):
    if available_backends("linear")["onednn"] is not True:
        pytest.skip("torch has no oneDNN")
    measured("onednn", "onednn", "onednn")
    with torch.backends.mkldnn.flags(enabled=False):
        for call in (linear, api.multiply):
            leaves = [tensor.requires_grad_() for tensor in inputs()]
            with Ran() as ran:
                torch.autograd.grad(call(*leaves).sum(), leaves)
            assert set(ran.products) == {"torch"}
        with pytest.raises(UnsupportedError, match=r"torch\.backends\.mkldnn is switched off"):
            linear(*inputs(), backend="onednn")
    with Ran() as ran:
        linear(*inputs())
    assert ran.products == ["onednn"]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_any_number_of_rows_is_compiled_once(backend, measured, compiled):
    measured("cpu", "onednn", "onednn")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    _, *parameters = inputs()
    run = torch.compile(
        lambda x: linear(x, *parameters, activation="gelu", backend=backend), fullgraph=True, backend=counter
    )
    for rows in (33, 2, 111):
        x = torch.randn(rows, 40)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(run(x), linear(x, *parameters, activation="gelu", backend="reference"))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("rows", "width", "out"), [(0, 40, 24), (3, 0, 24), (3, 40, 0), (0, 0, 0)])
def test_the_operation_takes_nothing_too(rows, width, out, kernels):
    """As anybody can call it: linear leaves what is empty to the reference."""
    x, weight, bias = inputs(rows, width, out)
    found = FWD[kernels](x, weight, None, bias, 0, None, torch.ones(rows, out))
    assert_same(found, bias.expand(rows, -1) + 1)


@pytest.mark.parametrize("gate", [None, (), (24,)], ids=str)
@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_opcheck(dtype, residual, gate, compiled):
    """The shape function knows the dtype of the sum, too."""
    case = Case(rows=(3,), dtype=dtype, gate=gate, residual=residual is not None, residual_dtype=residual)
    tensors = replace(case, gate_dtype=torch.float32).tensors()
    names = ("gate", "residual")
    arguments = [tensors["x"], tensors["weight"], None, tensors["bias"], 1, *map(tensors.get, names)]
    torch.library.opcheck(FWD["cpu"], tuple(arguments))


@pytest.mark.parametrize("name", ["residual", "gate", "bias"])
def test_auto_keeps_from_the_kernel_what_it_cannot_read(name, measured, compiled):
    measured("cpu")
    tensors = Case(rows=(3,), residual=True, gate=(24,)).tensors()
    plain = linear(**tensors, backend="reference")
    for other in (torch.Tensor.double, lambda tensor: TwoTensor(tensor, tensor)):
        if name == "bias" and other is torch.Tensor.double:
            continue  # a product is of one dtype
        found = linear(**tensors | {name: other(tensors[name])})
        torch.testing.assert_close(getattr(found, "a", found).float(), plain)


def test_tensors_without_numbers_are_torchs(measured, compiled):
    measured("cpu", "onednn", "onednn")
    with FakeTensorMode() as mode:
        for backend in ("auto", "cpu", "reference"):
            leaves = [mode.from_tensor(tensor).requires_grad_() for tensor in inputs()]
            y = linear(*leaves, activation="gelu", backend=backend)
            assert y.shape == (3, 24)
            torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_onednn_is_looked_for_in_float32_whatever_the_default_is(dtype):
    found, look = products._has_onednn(), products._has_onednn.__wrapped__
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert look() is found
    finally:
        torch.set_default_dtype(before)


def test_a_small_weight_is_torchs(measured, monkeypatch, compiled):
    measured("cpu")
    for least, expected in ((24 * 40, "cpu"), (24 * 40 + 1, "torch")):
        monkeypatch.setattr(config, "LEAST_WEIGHTS", least)
        for call in (linear, api.multiply):
            with Ran() as ran:
                call(*inputs())
            assert ran.products == [expected]


# tables


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Files of ours in the place of the shipped one and the user's; what writes them."""
    for name in ("SHIPPED", "OWN"):
        monkeypatch.setattr(config, name, tmp_path / f"{name}.json")
    config.forget()

    def write(name, products, processor=None):
        entry = {processor or config.processor(): {"products": products}}
        getattr(config, name).write_text(json.dumps(entry))
        config.forget()

    yield write
    monkeypatch.undo()
    config.forget()


def test_limits_are_read_in_order(tables):
    forward = [[2, "cpu"], [16, "onednn"], [64, "mkl"]]
    tables("SHIPPED", {"float32": {"forward": forward, "dw": [[8, "onednn"]]}})
    counts = (1, 2, 3, 8, 9, 16, 17, 64, 65)
    forward, dx, dw = ([config.choose(way, torch.float32, rows) for rows in counts] for way in config.WAYS)
    assert forward == ["cpu", "cpu", "onednn", "onednn", "onednn", "onednn", "mkl", "mkl", "torch"]
    assert dx == ["torch"] * 9
    assert dw == ["onednn"] * 4 + ["torch"] * 5
    assert config.choose("forward", torch.bfloat16, 1) == "torch"


def test_what_its_user_measured_comes_first(tables):
    tables("SHIPPED", {"float32": {"forward": [[16, "mkl"]]}})
    assert config.choose("forward", torch.float32, 1) == "mkl"
    tables("OWN", {"float32": {"forward": [[16, "cpu"]]}}, processor="another")
    assert config.choose("forward", torch.float32, 1) == "mkl"
    tables("OWN", {"float32": {"forward": [[16, "cpu"]]}})
    assert config.choose("forward", torch.float32, 1) == "cpu"


def test_a_processor_that_nobody_measured_gets_torchs_products(tables):
    assert config.choose("forward", torch.float32, 1) == "torch"
    tables("SHIPPED", {"float32": {"forward": [[16, "cpu"]]}}, processor="another")
    assert config.choose("forward", torch.float32, 1) == "torch"


def test_what_is_kept_is_read_at_once(tables):
    tables("OWN", {"float32": {"forward": [[16, "mkl"]]}}, processor="another")
    assert config.choose("forward", torch.float32, 1) == "torch"
    config.keep({"products": {"float32": {"forward": [[16, "cpu"]]}}})
    assert config.choose("forward", torch.float32, 1) == "cpu"
    assert set(json.loads(config.OWN.read_text())) == {"another", config.processor()}


OTHER_TABLES = ({}, {"products": 1}, {"products": {"float32": {"forward": [[1, "magic"]]}}})


@pytest.mark.parametrize("broken", ["", "{", '{"a": }', "\0", "[]", "1", *OTHER_TABLES], ids=str)
def test_a_broken_file_is_named_in_a_line(broken, tables, monkeypatch):
    monkeypatch.setattr(config, "LEAST_WEIGHTS", 0)
    config.OWN.write_text(broken if isinstance(broken, str) else json.dumps({config.processor(): broken}))
    with pytest.raises(
        ValueError, match=r"^linear: expected JSON in .*OWN\.json, got .*; delete it"
    ) as caught:
        linear(*inputs())
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_shipped_table_names_products_that_there_are():
    for processor, measured in json.loads(config.SHIPPED.read_text()).items():
        for dtype, ways in measured["products"].items():
            assert dtype in [str(each)[6:] for each in DTYPES], processor
            assert set(ways) <= set(config.WAYS)
            for way, limits in ways.items():
                assert {name for _, name in limits} <= PRODUCTS.keys() - (
                    {"cpu"} if way != "forward" else set()
                )
                rows = [most or torch.inf for most, _ in limits]
                assert rows == sorted(rows)


def test_the_folder_of_the_own_table_is_the_environments(tmp_path):
    program = "from flamingo_kernels.ops.linear import config; print(config.OWN)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"FLAMINGO_KERNELS_CACHE": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.stdout.strip() == str(tmp_path / "linear.json"), done.stderr


# multiply


def test_multiply_is_linear(backend, measured):
    if backend == "reference":
        pytest.skip("auto has another name for torch's product")
    measured(backend)
    for rows in (1, 3):
        tensors = inputs(rows)
        assert torch.equal(api.multiply(*tensors), linear(*tensors, backend=backend))
        no_bias = tensors[:2]
        assert torch.equal(api.multiply(*no_bias), linear(*no_bias, backend=backend))


class Named(torch.Tensor):
    """A tensor by another name."""


def _as(kind):
    return lambda: tuple(kind(tensor) for tensor in inputs())


OTHER_INPUTS = {
    "float64": lambda: inputs(dtype=torch.float64),
    "a subclass": _as(lambda tensor: tensor.as_subclass(Named)),
    "a weight of a subclass": lambda: (inputs()[0], inputs()[1].as_subclass(Named)),
    "a bias of a subclass": lambda: (*inputs()[:2], inputs()[2].as_subclass(Named)),
    "meta": _as(lambda tensor: tensor.to("meta")),
    "no row": lambda: inputs(rows=0),
    "no input": lambda: inputs(width=0),
    "a weight of one output": lambda: (inputs()[0], inputs()[1][0]),
    "a sparse weight": lambda: (inputs()[0], inputs()[1].to_sparse_csr()),
    "one bias for all": lambda: (*inputs()[:2], torch.randn(1)),
    "a bias for every row": lambda: (*inputs()[:2], torch.randn(3, 24)),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Sparse CSR tensor support")
def test_multiply_leaves_torch_what_else_it_takes(name, measured, compiled):
    measured("cpu")
    tensors = OTHER_INPUTS[name]()
    with Ran() as ran:
        found = api.multiply(*tensors)
    expected = F.linear(*tensors)
    assert "cpu" not in ran.products
    assert (found.shape, found.dtype, type(found)) == (expected.shape, expected.dtype, type(expected))
    if not found.is_meta:
        assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
def test_multiply_leaves_torch_autocast_tracing_and_tensors_of_two(measured, compiled):
    measured("cpu")
    tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(api.multiply(*tensors), F.linear(*tensors))
    pairs = [TwoTensor(each, each) for each in tensors]
    torch.testing.assert_close(api.multiply(*pairs).a, F.linear(*tensors))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) for each in tensors]
        assert api.multiply(*fake).shape == (3, 24)
    traced = torch.jit.trace(api.multiply, tensors)
    assert "linear_fwd" not in str(traced.graph)


def test_multiply_leaves_a_compiler_torchs_product(measured, compiled):
    measured("cpu", "onednn", "onednn")
    graphs = []
    torch._dynamo.reset()
    run = torch.compile(
        api.multiply, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    tensors = inputs()
    assert torch.equal(run(*tensors), F.linear(*tensors))
    (graph,) = graphs
    assert F.linear in [node.target for node in graph.graph.nodes]
    torch._dynamo.reset()


WRONG_INPUTS = {
    "inputs": lambda: (torch.zeros(3, 39), torch.zeros(24, 40)),
    "bias": lambda: (torch.zeros(3, 40), torch.zeros(24, 40), torch.zeros(23)),
    "dtype of x": lambda: (torch.zeros(3, 40).half(), torch.zeros(24, 40)),
    "dtype of the bias": lambda: (torch.zeros(3, 40), torch.zeros(24, 40), torch.zeros(24).half()),
    "integers": lambda: (torch.zeros(3, 40).int(), torch.zeros(24, 40)),
    "x without dimensions": lambda: (torch.zeros(()), torch.zeros(24, 40)),
    "weight of three dimensions": lambda: (torch.zeros(3, 40), torch.zeros(2, 24, 40)),
}


@pytest.mark.parametrize("way", ["cpu", "onednn"])
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_multiply_raises_torchs_own_error(name, way, measured, compiled):
    measured(way)
    tensors = WRONG_INPUTS[name]()
    with pytest.raises(RuntimeError) as expected:
        F.linear(*tensors)
    with pytest.raises(RuntimeError) as found:
        api.multiply(*tensors)
    assert str(found.value) == str(expected.value)


def test_dispatch_knows_its_libraries():
    available = available_backends("linear")
    assert list(available) == ["cuda", "triton", "cpu", "reference", *LIBRARIES]
    assert dispatch.resolve("linear", "reference") == "reference"


@pytest.mark.parametrize("out", [16, 7, 130])
@pytest.mark.parametrize("width", [32, 96, 40])
@pytest.mark.parametrize("rows", [4, 5, 16, 17, 33, 64, 65, 130])
def test_rows_in_tiles(rows, width, out, compiled):
    """Where a processor has tiles, in bfloat16: whole and partial ones, and widths that they do not take."""
    case = Case(rows=(rows,), width=width, out=out, dtype=torch.bfloat16, residual=True, gate=(out,))
    assert_within_budget(case, compiled)
