"""linear with a weight of 8-bit integers: against float64 within what rounding x can cost."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels import UnsupportedError, linear, use_backend
from flamingo_kernels._backends import cpu
from flamingo_kernels.ops.linear import int8
from flamingo_kernels.ops.linear.schema import ACTIVATIONS, FWD
from flamingo_kernels.testing import DTYPES, lay_out
from tests.flamingo_kernels.ops.conftest import OTHERS, select
from tests.helpers.same import assert_same

ROWS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 257]
_MOST_INTERPRETED = 2**18  # numbers of x: a test in Triton's interpreter takes seconds for more
SHAPES = [(40, 24), (64, 64), (130, 65), (1, 1), (3, 70), (63, 17), (128, 128), (2100, 37), (4096, 80)]
# What the largest number of a row of x becomes at least: with few rows, and with many.
FINE, COARSE = 127 * 128, 127
MOST_FINE = {
    "avx2_vnni": 4,
    "avx512_bf16": 4,
    "avx512_amx": 16,
}  # rows, of the instruction sets that multiply 8 bits at once


@pytest.fixture(params=["reference", "triton", "cuda", "cpu", *OTHERS])
def backend(request, running, select_variant) -> str:
    return select(request.param, running, select_variant)


@pytest.fixture(params=["triton", "cuda", "cpu", *OTHERS])
def kernels(request, running, select_variant) -> str:
    return select(request.param, running, select_variant)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    weight_scale: Tensor

    def keywords(self) -> dict[str, Tensor]:
        return self._asdict()


def inputs(rows=3, width=40, out=24, dtype=torch.float32) -> Inputs:
    weight, scale = int8.quantize_weight(torch.randn(out, width) / max(width, 1) ** 0.5)
    return Inputs(torch.randn(rows, width).to(dtype), weight, torch.randn(out).to(dtype), scale)


def exact(given: Inputs) -> Tensor:
    """In float64, by the integers and scales."""
    return F.linear(
        given.x.double(), given.weight.double() * given.weight_scale.double()[:, None], given.bias.double()
    )


def is_coarse(rows: int) -> bool:
    """Whether x has 8 bits."""
    return rows > MOST_FINE.get(cpu.cpu_variant(), rows)


def bound(given: Inputs, backend: str, rows: int) -> Tensor:
    """What half a step of every element of x costs on a processor, and sums in float32 and the dtype."""
    x, weight = given.x.double(), (given.weight.double() * given.weight_scale.double()[:, None]).abs()
    step = x.abs().amax(1, keepdim=True) / (COARSE if is_coarse(rows) else FINE)
    right = exact(given)
    size = x.abs() @ weight.t() + given.bias.double().abs()
    roundings = size * 2.0**-18 + right.abs() * torch.finfo(given.x.dtype).eps
    if backend == "reference":  # which rounds the weight to the dtype of x
        return roundings + size * torch.finfo(given.x.dtype).eps * 2
    if backend in ("triton", "cuda"):  # which multiply x as it is
        return roundings
    return step / 2 * weight.sum(1) + roundings


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(shape, dtype, backend):
    for rows in ROWS:
        if backend == "triton" and rows * shape[0] > _MOST_INTERPRETED:
            continue
        given = inputs(rows, *shape, dtype)
        found = linear(**given.keywords(), backend=backend)
        assert found.dtype == dtype
        error = (found.double() - exact(given)).abs()
        assert (error <= bound(given, backend, rows)).all(), (rows, error.max())


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("gate", [None, (), (24,)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_follows_the_product(activation, gate, residual, rows, kernels):
    given = inputs(rows, dtype=torch.float16)
    more = {
        "gate": None if gate is None else torch.randn(gate),
        "residual": None if residual is None else torch.randn(rows, 24).to(residual),
    }
    found = linear(**given.keywords(), activation=activation, **more, backend=kernels)
    right = linear(
        *(given.x.double(), given.weight, given.bias.double()),
        weight_scale=given.weight_scale,
        activation=activation,
        **{name: None if each is None else each.double() for name, each in more.items()},
        backend="reference",
    )
    torch.testing.assert_close(found.double(), right, atol=0.1 if is_coarse(rows) else 0.01, rtol=0.01)
    plain = linear(
        given.x, given.weight, given.bias, weight_scale=given.weight_scale, activation=activation, **more,
        backend="reference",
    )  # fmt: skip
    assert found.dtype == plain.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("outliers", ["channels", "a row"])
def test_outliers_cost_no_accuracy(outliers, dtype, kernels):
    """A few channels of large numbers, as language models have them, leave 8 bits no steps for the others."""
    if not kernels.startswith("cpu"):
        pytest.skip("its kernels round no row of x")
    for rows in (2, 8, 20, 40, 130, 300):
        given = inputs(rows, 2100, 70, dtype)
        if outliers == "channels":
            given.x[:, [7, 500, 1300]] *= 100
        else:
            given.x[rows // 2, 100] = 1000
        found, right = linear(**given.keywords(), backend=kernels).double(), exact(given)
        assert ((found - right).abs() <= bound(given, kernels, 1)).all(), rows
        without = given._replace(x=given.x.masked_fill(given.x.abs() > 10, 0))
        shares = (linear(**without.keywords(), backend=kernels).double() - exact(without)).norm(dim=1)
        assert (shares < 0.02 * exact(without).norm(dim=1)).all()


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_a_row_depends_on_no_other(rows, kernels):
    """But for how many there are: many are rounded in another way."""
    given = inputs(rows, 300, 37)
    whole = linear(**given.keywords(), backend=kernels)
    changed = given.x.clone()
    changed[: rows // 2] = 100
    found = linear(**given._replace(x=changed).keywords(), backend=kernels)
    assert torch.equal(found[rows // 2 :], whole[rows // 2 :])


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 300])
def test_threads_and_repeats_change_nothing(rows, kernels, set_threads):
    if rows == 300 and kernels == "triton":
        pytest.skip("they take the tiles of 33")
    given = inputs(rows, 1100, 333)
    set_threads(1)
    expected = linear(**given.keywords(), activation="gelu", backend=kernels)
    for threads in (2, 4, 4, 3):
        set_threads(threads)
        assert torch.equal(linear(**given.keywords(), activation="gelu", backend=kernels), expected)


@pytest.mark.parametrize("layout", ["slice", "strided"])
@pytest.mark.parametrize("name", ["x", "bias"])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_strides_and_what_lies_behind_change_nothing(rows, name, layout, kernels):
    given = inputs(rows)
    expected = linear(**given.keywords(), backend=kernels)
    other = given._replace(**{name: lay_out(getattr(given, name), layout)})
    assert torch.equal(linear(**other.keywords(), backend=kernels), expected)


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_a_weight_in_a_larger_one_is_read_alone(width, rows, kernels):
    given = inputs(rows, width, 64)
    expected = linear(**given.keywords(), backend=kernels)
    for pad in (1, 4, 64):
        larger = torch.full((66, width + pad), 127, dtype=torch.int8)
        larger[1:65, :width] = given.weight
        inner = larger[1:65, :width]
        assert torch.equal(linear(**given._replace(weight=inner).keywords(), backend=kernels), expected)
    turned = given.weight.t().contiguous().t()
    assert torch.equal(linear(**given._replace(weight=turned).keywords(), backend=kernels), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 17), (3, 39)])
@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_row_that_is_not_finite_is_so_alone(dtype, rows, place, value, kernels):
    given = inputs(rows, dtype=dtype)
    clean = linear(**given.keywords(), backend=kernels)
    given.x[place] = value
    found = linear(**given.keywords(), backend=kernels)
    if kernels.startswith("cpu"):
        assert found[place[0]].isnan().all()
    assert not found[place[0]].isfinite().any()
    others = torch.arange(rows) != place[0]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-36, 1e30], ids=str)
def test_rows_of_any_size(size, rows, kernels):
    given = inputs(rows)
    given = given._replace(x=given.x * size, bias=torch.zeros(24))
    found = linear(**given.keywords(), backend=kernels)
    right = exact(given)
    assert ((found.double() - right).abs() <= 0.03 * right.abs().max() + 1e-34).all()


def test_the_largest_integers_do_not_overflow(kernels):
    for rows in (1, 16, 20):
        x, weight = torch.ones(rows, 9000), torch.full((20, 9000), 127, dtype=torch.int8)
        for signs in (1, -1):
            found = linear(x, signs * weight, weight_scale=torch.ones(20), backend=kernels)
            torch.testing.assert_close(found, torch.full((rows, 20), signs * 127.0 * 9000))


@pytest.mark.slow
def test_sums_too_long_for_many_rows(kernels):
    """Beyond 65,536 numbers a sum of 8-bit products may not fit into 32 bits."""
    x, weight = torch.ones(20, 140_000), torch.full((3, 140_000), 127, dtype=torch.int8)
    found = linear(x, weight, weight_scale=torch.ones(3), backend=kernels)
    torch.testing.assert_close(found, torch.full((20, 3), 127.0 * 140_000), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(0, 40, 24), (3, 0, 24), (3, 40, 0), (20, 0, 24)])
def test_the_operation_takes_nothing_too(shape, kernels):
    x, weight, bias, scale = inputs(*shape)
    found = FWD[kernels](x, weight, scale, bias, 0, None, None)
    assert_same(found, bias.expand(shape[0], -1))


@pytest.mark.parametrize("rows", [3, 20])
def test_opcheck(rows, compiled):
    x, weight, bias, scale = inputs(rows)
    torch.library.opcheck(FWD["cpu"], (x, weight, scale, bias, 1, torch.randn(24), torch.randn(rows, 24)))


# gradients and modes


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_of_what_flows_through(rows, backend, running):
    running("cpu")
    given = inputs(rows)
    x, bias = given.x.requires_grad_(), given.bias.requires_grad_()
    dy = torch.randn(rows, 24)
    linear(**given.keywords(), activation="silu", backend=backend).backward(dy)
    doubles = [each.detach().double().requires_grad_() for each in (x, bias)]
    numbers = given.weight.double() * given.weight_scale.double()[:, None]
    F.silu(F.linear(doubles[0], numbers, doubles[1])).backward(dy.double())
    for found, right in zip((x, bias), doubles, strict=True):
        torch.testing.assert_close(found.grad.double(), right.grad, atol=0.05, rtol=0.02)
        if backend == "reference":
            torch.testing.assert_close(found.grad.double(), right.grad, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_x_is_exact_where_nothing_follows(compiled):
    given = inputs(20)
    x = given.x.requires_grad_()
    dy = torch.randn(20, 24)
    linear(**given.keywords()).backward(dy)
    torch.testing.assert_close(x.grad, dy @ int8.dequantize(given.weight, given.weight_scale, torch.float32))


def test_second_derivatives(compiled):
    given = inputs(3)
    x = given.x.requires_grad_()
    (dx,) = torch.autograd.grad(linear(**given.keywords(), activation="silu").sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.sum(), x)
    assert again.isfinite().all()
    assert again.abs().sum() > 0


def test_a_batch_of_gradients(compiled):
    given = inputs(20)
    x = given.x.requires_grad_()
    y = linear(**given.keywords())
    dy = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (found,) = torch.autograd.grad(y, x, dy, is_grads_batched=True)
    torch.testing.assert_close(found[1], 2 * found[0])


def test_vmap_takes_torch(compiled):
    given = inputs(6)
    one = given.keywords()
    found = torch.vmap(lambda row: linear(**one | {"x": row[None]})[0])(given.x)
    torch.testing.assert_close(found, linear(**given.keywords(), backend="reference"))


def test_autocast_gives_its_dtype(compiled):
    given = inputs(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(**given.keywords())
        layer = int8.multiply(given.x, given.weight, given.weight_scale, given.bias)
    assert found.dtype == layer.dtype == torch.bfloat16
    assert torch.equal(found, layer)
    half = given._replace(x=given.x.bfloat16(), bias=given.bias.bfloat16())
    assert torch.equal(found, linear(**half.keywords()))


@pytest.mark.parametrize("rows", [3, 20])
def test_a_compiled_call_is_the_kernels(rows, compiled):
    given = inputs(rows)
    run = torch.compile(partial(linear, activation="gelu"), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(run(**given.keywords()), linear(**given.keywords(), activation="gelu"))
    torch._dynamo.reset()


def test_auto_is_the_kernel(compiled):
    given = inputs(3)
    assert torch.equal(linear(**given.keywords()), linear(**given.keywords(), backend="cpu"))
    with use_backend("reference"):
        plain = linear(**given.keywords())
    assert torch.equal(plain, linear(**given.keywords(), backend="reference"))


# making integers


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_integers_are_within_half_a_step(dtype):
    weight = torch.randn(70, 33).to(dtype)
    integers, scale = int8.quantize_weight(weight)
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert (integers.abs().amax(1) == 127).all()
    numbers = integers.double() * scale.double()[:, None]
    assert ((weight.double() - numbers).abs() <= scale.double()[:, None] * 0.5001).all()
    error = int8.largest_error(weight, integers, scale)
    torch.testing.assert_close(error, (weight.double() - numbers).abs().max().item(), rtol=1e-4, atol=0)


def test_many_pieces_are_one(monkeypatch):
    weight = torch.randn(70, 33)
    whole = int8.quantize_weight(weight)
    monkeypatch.setattr(int8, "_PIECE", 100)
    assert all(map(torch.equal, int8.quantize_weight(weight), whole))


def test_a_row_of_zeros_or_next_to_nothing():
    weight = torch.zeros(3, 5)
    weight[1] = 1e-42
    integers, scale = int8.quantize_weight(weight)
    assert not integers.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    weight = torch.randn(3, 5)
    weight[2, 4] = value
    with pytest.raises(ValueError, match=r"^quantize_weight: expected finite numbers"):
        int8.quantize_weight(weight)


# wrong arguments


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight_scale": None}, TypeError, r"expected a weight_scale \[out\] for a weight of torch.int8"),
        ({"weight": torch.zeros(24, 40)}, TypeError, "expected a weight of torch.int8 with weight_scale"),
        ({"weight_scale": torch.ones(24).double()}, TypeError, "expected weight_scale in torch.float32"),
        ({"weight_scale": torch.ones(23)}, ValueError, "expected weight_scale"),
        ({"weight_scale": torch.ones(24, requires_grad=True)}, TypeError, "without a gradient"),
        ({"bias": torch.zeros(24).bfloat16()}, TypeError, "bias"),
        ({"x": torch.zeros(3, 40, dtype=torch.int32)}, TypeError, "x"),
    ],
)
def test_wrong_arguments(changed, error, message):
    with pytest.raises(error, match=f"^linear: .*{message}"):
        linear(**inputs().keywords() | changed)


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_libraries_refuse_integers(library):
    with pytest.raises(UnsupportedError, match=library):
        linear(**inputs().keywords(), backend=library)
