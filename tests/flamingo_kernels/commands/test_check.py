"""`python -m flamingo_kernels check` shows every backend, and fails when a kernel does."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo_kernels.__main__ import main
from flamingo_kernels._backends import cuda, dispatch
from flamingo_kernels.commands import check, info
from flamingo_kernels.ops.gated_residual import reference
from flamingo_kernels.testing import DTYPES, GatedResidualCase, Measurement


@pytest.fixture
def small(monkeypatch):
    """Only one small case, so that a run takes no time."""
    monkeypatch.setattr(check, "CASES", [GatedResidualCase(shape=(30, 40))])
    monkeypatch.setattr(dispatch, "_OPERATORS", {"gated_residual": dispatch._OPERATORS["gated_residual"]})


def run(*arguments):
    return main(["check", *arguments])


def break_reference(monkeypatch):
    wrong = lambda x, y, gate: x + torch.tanh(gate) * y * 1.01  # noqa: E731
    monkeypatch.setattr(reference, "gated_residual", wrong)


def test_there_are_cases_for_every_operator():
    assert {case.operator for case in check.CASES} == set(dispatch.operators())


@pytest.fixture
def no_cuda(monkeypatch):
    """CUDA kernels that cannot run."""
    monkeypatch.setattr(cuda, "why_not", lambda: "the CUDA kernels are not built")


def test_the_table_has_a_row_for_every_dtype(small, no_cuda, capsys):
    assert run() == 0
    page = capsys.readouterr().out
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"reference          {dtype}" in page
    assert "not run: cuda: the CUDA kernels are not built" in page
    assert page.rstrip().endswith("all passed")


@pytest.mark.skipif(info.variant("triton") == "triton", reason="Triton's interpreter is off")
def test_the_interpreter_has_rows_of_its_own(small):
    assert {row.dtype for row in check.rows() if row.backend == "triton/interpreter"} == set(DTYPES)


def test_json(small, no_cuda, capsys):
    assert run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert "cuda" in found["not_run"]
    row = next(row for row in found["rows"] if row["backend"] == "reference")
    assert row["operator"] == "gated_residual"
    assert row["error"] <= row["budget"]


def test_a_wrong_kernel_fails(small, monkeypatch, capsys):
    break_reference(monkeypatch)
    assert run() == 1
    page = capsys.readouterr().out
    assert "FAILED: shape=(30,40)" in page
    assert page.rstrip().endswith("FAILED")
    assert run("--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_one_wrong_case_among_right_ones_fails(small, monkeypatch, capsys):
    cases = [GatedResidualCase(shape=shape) for shape in ((3, 4), (30, 40), (5, 6))]
    right = reference.gated_residual
    monkeypatch.setattr(check, "CASES", cases)
    monkeypatch.setattr(
        reference, "gated_residual", lambda x, y, gate: right(x, y * (1 + 0.1 * (len(x) == 30)), gate)
    )
    assert run() == 1
    assert "FAILED: shape=(30,40)" in capsys.readouterr().out


def test_nan_fails(small, monkeypatch):
    monkeypatch.setattr(reference, "gated_residual", lambda x, y, gate: x + torch.tanh(gate) * y * torch.nan)
    assert run() == 1


def test_which_backends_run_depends_on_the_device(compiled):
    here, there = (check.backends_on(device, "gated_residual") for device in ("cpu", "meta"))
    assert here["cpu"] is True
    assert there["cpu"] == "a tensor is on meta, not on cpu"
    assert there["reference"] is True
    assert check.not_run("meta")["cpu"] == there["cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_said_so(capsys):
    assert run("--device", "cuda") == 2
    assert capsys.readouterr().err.startswith("check: there is no GPU here that torch can use: ")


def test_an_interpreter_gets_the_smallest_shapes():
    assert check._cases_for("reference") == check.CASES
    assert [str(case) for case in check._cases_for("triton")] == ["default"] * len(dispatch.operators())


def test_nan_is_the_worst_there_is():
    within, without, nan = (Measurement("out", error, 1.0, 1.0) for error in (1.0, 4.0, float("nan")))
    assert max(within, nan, key=check.severity) is nan
    assert max(within, without, key=check.severity) is without
