"""`python -m flamingo_kernels check` shows every backend, and fails when a kernel does."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo_kernels import _dispatch, check
from flamingo_kernels.ops.gated_residual import reference
from flamingo_kernels.testing import GatedResidualCase


@pytest.fixture
def small(monkeypatch):
    """Only one small case, so that a run takes no time."""
    monkeypatch.setattr(check, "CASES", [GatedResidualCase(shape=(30, 40))])
    monkeypatch.setattr(_dispatch, "_OPERATORS", {"gated_residual": _dispatch._OPERATORS["gated_residual"]})


def break_reference(monkeypatch):
    wrong = lambda x, y, gate: x + torch.tanh(gate) * y * 1.01  # noqa: E731
    monkeypatch.setattr(reference, "gated_residual", wrong)


def test_there_are_cases_for_every_operator():
    assert {case.operator for case in check.CASES} == set(_dispatch.operators())


def test_the_table_has_a_row_for_every_dtype(small, capsys):
    assert check.run() == 0
    page = capsys.readouterr().out
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"reference        {dtype}" in page
    assert "not run: triton: this version has no triton kernel" in page
    assert page.rstrip().endswith("all passed")


def test_json(small, capsys):
    assert check.run(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {"cuda", "triton"} <= set(found["not_run"])
    row = next(row for row in found["rows"] if row["backend"] == "reference")
    assert row["operator"] == "gated_residual"
    assert row["error"] <= row["budget"]


def test_a_wrong_kernel_fails(small, monkeypatch, capsys):
    break_reference(monkeypatch)
    assert check.run() == 1
    page = capsys.readouterr().out
    assert "FAILED: shape=(30,40)" in page
    assert page.rstrip().endswith("FAILED")
    assert check.run(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_nan_fails(small, monkeypatch):
    monkeypatch.setattr(reference, "gated_residual", lambda x, y, gate: x + torch.tanh(gate) * y * torch.nan)
    assert check.run() == 1
