"""The byte model against the tensors themselves, and the ceilings against a clock that is known."""

import pytest
import torch

from flamingo_kernels.commands.bench import floors
from flamingo_kernels.commands.bench.baselines import OURS, contenders
from flamingo_kernels.commands.bench.floors import Ceilings, ceilings, least_bytes
from flamingo_kernels.commands.bench.shapes import GPU_CASES, HEADS, QUICK, Case


def case(op, mode, sizes, dtype="bfloat16"):
    return Case(op, sizes, dtype, mode)


def bytes_of(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["masked_cross_attention", "perceiver_attention"])
def test_an_attention_reads_and_writes_each_of_its_tensors_once(op, dtype):
    sizes = next(each.sizes for each in QUICK if each.op == op)
    ours = contenders(case(op, "forward", sizes, dtype))[OURS]()
    out = ours.call().detach()
    forward = bytes_of(*ours.wrt, out)
    backward = bytes_of(*ours.wrt, out) + bytes_of(out, *ours.wrt)  # and dout, and the gradients
    found = [
        least_bytes(case(op, mode, sizes, dtype)) for mode in ("forward", "backward", "forward+backward")
    ]
    assert found == [forward, backward, forward + backward]


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_residual_moves_three_tensors_of_its_size(mode):
    """x, y and out; dout, y and dy, as dx is dout."""
    assert least_bytes(case("gated_residual", mode, {"rows": 30, "D": 64})) == 3 * 30 * 64 * 2


def test_a_known_shape():
    sizes = {"B": 8, "T": 1024, "M": 8, **HEADS}
    assert least_bytes(case("masked_cross_attention", "forward", sizes)) == 2 * (
        2 * 8 * 1024 * 512 + 2 * 8 * 512 * 512
    )


def test_every_operator_on_a_gpu_has_a_floor_and_a_layer_has_none():
    for each in GPU_CASES:
        assert (least_bytes(each) is None) is each.op[0].isupper(), each


def test_ceilings_are_work_over_the_time_of_the_clock(monkeypatch):
    monkeypatch.setitem(floors.COPY_BYTES, "cpu", 4000)
    monkeypatch.setitem(floors.GEMM_SIZE, "cpu", 8)
    called = []

    def clock(call, last):
        called.append(call())
        return 2.0

    found = ceilings("cpu", clock)
    assert found == Ceilings(
        copy_gb_s=pytest.approx(8000 / 2e-3 / 1e9), gemm_tflop_s=pytest.approx(1024 / 2e-3 / 1e12)
    )
    shapes = {(tuple(result.shape), result.dtype) for result in called}
    assert shapes == {((1000,), torch.float32), ((8, 8), torch.bfloat16)}
    assert all(result.count_nonzero() == result.numel() for result in called), "never on zeros"
