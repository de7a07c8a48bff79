"""What the gate proves: every case in every dtype on every backend that has the operator."""

from __future__ import annotations

import itertools
from collections import Counter

import torch

from flamingo_kernels.commands import check
from flamingo_kernels.commands.gpu import plan, sanitizer
from flamingo_kernels.testing import GatedResidualCase, PerceiverAttentionCase


def test_a_task_for_each_dtype_case_and_backend():
    cases = [GatedResidualCase(shape=(3, 8)), PerceiverAttentionCase()]
    backends = {"gated_residual": ["cuda", "triton"], "perceiver_attention": ["cpu"]}
    dtypes = (torch.float16, torch.float64)
    tasks = plan.tasks("graph", cases, backends, "meta", dtypes)
    found = [(task.check, task.case.operator, task.case.dtype, task.backend) for task in tasks]
    assert found == [
        ("graph", operator, dtype, backend)
        for dtype in dtypes  # the most important first, for all cases
        for operator, each in backends.items()
        for backend in each
    ]
    assert {task.case.device for task in tasks} == {"meta"}
    assert {task.case.shape for task in tasks if task.case.operator == "gated_residual"} == {(3, 8)}


def test_the_full_plan_leaves_nothing_out():
    full = plan.FULL
    checked = list(check.CASES)
    groups = (plan.MASKED, plan.PERCEIVER, plan.ROWS, plan.DECODE, plan.LINEAR)
    every = [*checked, *sanitizer.SMALL, *itertools.chain(*groups)]
    assert set(full.cases) == set(every)
    assert max(Counter(full.cases).values()) == 1
    assert full.cases[: full.first] == checked
    assert {*full.dtypes} == {torch.bfloat16, torch.float32, torch.float16}
    operators = {case.operator for case in checked}
    for cases in (full.cases, full.repeated, plan.QUICK.cases):
        assert {case.operator for case in cases} == operators
    assert {case.operator for case in full.large} == operators - {"gated_block_decode", "linear"}


def test_where_time_runs_out_it_does_for_all_operators_alike():
    first = plan._in_turn(plan.MASKED, plan.PERCEIVER, plan.ROWS, plan.DECODE)[:8]
    assert first == [
        cases[n] for n in (0, 1) for cases in (plan.MASKED, plan.PERCEIVER, plan.ROWS, plan.DECODE)
    ]
