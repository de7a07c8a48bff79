import functools

import pytest
import torch

from flamingo_kernels.bench import run as bench
from flamingo_kernels.bench.baselines import OURS, Contender, contenders
from flamingo_kernels.bench.shapes import CASES, QUICK

CASE = next(case for case in QUICK if (case.op, case.mode) == ("masked_cross_attention", "forward+backward"))
AGAINST = ("eager", "sdpa")


def spoil(monkeypatch, name, change):
    """Put another contender in the place of one."""

    @functools.wraps(contenders)
    def spoilt(case, dtype=None, device="cpu"):
        makers = contenders(case, dtype, device)
        return makers if dtype else {**makers, name: lambda: change(makers[name]())}

    monkeypatch.setattr(bench, "contenders", spoilt)


def scaled(contender):
    return contender._replace(call=lambda: contender.call() * 1.001)


def wrong_gradient(contender):
    def call():
        out = contender.call()
        return out + (contender.wrt[0] - contender.wrt[0].detach()) * 1e-3  # 0, but not for q's gradient

    return contender._replace(call=call)


def failing(contender):
    def call():
        raise RuntimeError("no such kernel\nand a long story")

    return contender._replace(call=call)


@pytest.mark.parametrize("case", [case for case in QUICK if case.mode == "forward"], ids=str)
def test_ratios_are_the_quotients_of_the_medians(case):
    rivals = ["eager", "sdpa", "torch.add"]
    rows = bench.run([case], against=rivals, seconds=0).rows
    by_name = {row.contender: row for row in rows}
    assert set(by_name) == {OURS, *rivals} & set(contenders(case))
    for row in rows:
        assert row.ratio == row.median_ms / by_name[OURS].median_ms
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert (row.op, row.shape, row.dtype, row.mode) == (case.op, case.shape, case.dtype, case.mode)
        assert row.err is None or 0 <= row.err <= row.budget
    assert by_name[OURS].variant


@pytest.mark.parametrize("change", [scaled, wrong_gradient])
def test_a_wrong_rival_is_refused(monkeypatch, change):
    spoil(monkeypatch, "sdpa", change)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert [row.contender for row in outcome.rows] == [OURS, "eager"]
    (refused,) = outcome.skipped
    assert (refused.contender, refused.refused) == ("sdpa", True)
    assert "budget" in refused.reason


def test_without_a_right_result_of_ours_there_is_no_row(monkeypatch):
    spoil(monkeypatch, OURS, scaled)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert outcome.rows == []
    assert {each.contender: each.refused for each in outcome.skipped} == {
        OURS: True,
        "eager": False,
        "sdpa": False,
    }


def test_a_rival_that_fails_is_skipped_with_its_reason(monkeypatch):
    spoil(monkeypatch, "sdpa", failing)
    outcome = bench.run([CASE], against=AGAINST, seconds=0)
    assert [row.contender for row in outcome.rows] == [OURS, "eager"]
    (skipped,) = outcome.skipped
    assert (skipped.reason, skipped.refused) == ("RuntimeError: no such kernel", False)


def test_a_floor_is_timed_unchecked_and_forward_only():
    for mode, expected in (("forward", 1), ("forward+backward", 0)):
        case = next(case for case in QUICK if (case.op, case.mode) == ("gated_residual", mode))
        rows = bench.run([case], against=["torch.add"], seconds=0).rows
        assert [row.err for row in rows if row.contender == "torch.add"] == [None] * expected


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contenders_run_on_the_same_numbers_in_float64(case):
    with torch.no_grad():
        low, high = (contenders(case, dtype)["eager"]() for dtype in (None, torch.float64))
    assert isinstance(low, Contender)
    for a, b in zip(low.wrt, high.wrt, strict=True):
        assert torch.equal(a.double(), b)


def test_every_target_names_rivals_of_its_operator():
    names = {case.op: set(contenders(case)) for case in QUICK}
    assert {case.op for case in CASES} == set(names)
    for case in CASES:
        for target in case.targets:
            assert set(target.against) <= names[case.op]
