"""Which cases the options ask for, and how a shape that cannot be is refused."""

from __future__ import annotations

import inspect

import pytest

from flamingo_kernels.commands.bench import asked, baselines
from flamingo_kernels.commands.bench.baselines import contenders
from flamingo_kernels.commands.bench.rival import TAKES
from flamingo_kernels.commands.bench.shapes import CASES, DIMENSIONS, GPU_CASES, QUICK, Case

MASKED = "masked_cross_attention"


def shapes(*given, ops=()):
    return {(case.op, case.shape) for case in asked.cases(CASES, ops, given)}


def test_a_shape_chooses_the_operators_that_have_its_dimensions():
    assert shapes("B2 T512 M4 H16 d80 R64") == {(MASKED, "B2 T512 M4 H16 d80 R64")}
    assert shapes("D24 rows3 out5") == {("linear", "rows3 D24 out5"), ("linear, int8", "rows3 D24 out5")}
    assert (
        shapes("D24 rows3 out5", "rows1 D8", ops=()) > shapes("rows1 D8") == {("gated_residual", "rows1 D8")}
    )


def test_what_a_shape_leaves_out_is_as_usual():
    assert shapes("B1 T9 M2 d80") == {(MASKED, "B1 T9 M2 H8 d80 R64")}
    assert shapes("B1 M2 D8 Hkv2", ops=["gated_block"]) == {
        ("gated_block_decode", "B1 M2 D8 H8 Hkv2 d64 R64")
    }
    assert shapes("B1 M2 D8", ops=["gated_block"]) == {("gated_block_decode", "B1 M2 D8 H8 d64 R64")}


def test_a_shape_is_timed_in_the_modes_and_dtypes_of_its_operator():
    found = asked.cases(CASES, ["linear"], ["rows1 D8 out8"])
    kinds = {(case.dtype, case.mode) for case in CASES if case.op == "linear"}
    assert {(case.dtype, case.mode) for case in found} == kinds
    assert len(found) == len(kinds)
    found = asked.cases(CASES, ["linear"], ["rows1 D8 out8"], ["float16", "bfloat16"])
    assert {case.dtype for case in found} == {"float16", "bfloat16"}
    assert len(found) == 4


def test_a_dtype_alone_keeps_the_built_in_shapes_and_their_targets():
    found = asked.cases(CASES, [MASKED], dtypes=["bfloat16"])
    assert found == [case for case in CASES if (case.op, case.dtype) == (MASKED, "bfloat16")]
    assert any(case.targets for case in found)
    other = asked.cases(CASES, [MASKED], dtypes=["float16"])
    assert [case.shape for case in other[::2]] == [case.shape for case in found[::2]]


@pytest.mark.parametrize(
    ("ops", "shape", "message"),
    [
        ([MASKED], "B2 T512", "lacks M; masked_cross_attention takes B T M H8 d64 R64."),
        ([MASKED], "B2 T512 N3 M2", "has N; "),
        ([MASKED], "B2 T512 N3", "has N and lacks M; "),
        (["linear", MASKED], "rows1 D8 out8", "has rows, D, out and lacks B, T, M; "),
        ([], "B2 T512", "is one of no operator. They take masked_cross_attention: B T M H8 d64 R64; "),
        ([], "B2 T4 M4", "has M4, where more tokens than media are expected; "),
        ([], "B2 T4 M0", "has no M, where at least 1 is expected; "),
        (
            ["gated_block"],
            "B1 M1 D8 H8 Hkv3",
            "has Hkv3, where a divisor of H8 is expected; gated_block_decode ",
        ),
        (["gated_block"], "B1 M1 D8 Hkv0", "has no Hkv, where at least 1 is expected; "),
        (["decode step"], "B1 M1 D1", "has D1, where at least 2 is expected"),
        ([], "B9999999 T9999999 M9", "GiB and more in float64, by which it is checked, where "),
        ([], "B2 B3 T9", "where 'B3' names a dimension again."),
        ([], "B-2 T9", "where 'B-2' is no dimension and its size."),
        ([], "B2,T9", "where 'B2,T9' is no dimension and its size."),
        ([], "", "is one of no operator"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_a_line(ops, shape, message):
    with pytest.raises(ValueError, match="--shape") as caught:
        asked.cases(CASES, ops, [shape])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_dimensions_are_those_that_contenders_are_built_of():
    for op, build in baselines._BUILDERS.items():
        sizes = [
            each.name
            for each in inspect.signature(build).parameters.values()
            if each.kind == each.KEYWORD_ONLY
        ]
        assert {*sizes} == {*DIMENSIONS[op]}
    for case in (*CASES, *GPU_CASES, *QUICK):
        assert asked._sizes(case.op, case.sizes) == case.sizes
        assert list(asked._sizes(case.op, case.sizes)) == list(case.sizes), "or its targets are not found"


@pytest.mark.parametrize("case", [case for case in QUICK if case.mode == "forward"], ids=str)
def test_a_rival_is_given_what_is_documented(case: Case):
    eager = contenders(case)["eager"]()
    assert len(eager.given()) == len(TAKES[case.op])
