"""The steps of the gate, on a cpu in Triton's interpreter; graphs and streams are stubs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flamingo_kernels._backends import cuda, dispatch, env
from flamingo_kernels.commands import info
from flamingo_kernels.commands.bench import baselines, shapes
from flamingo_kernels.commands.bench.baselines import OURS, contenders
from flamingo_kernels.commands.bench.floors import Ceilings
from flamingo_kernels.commands.bench.run import prepare
from flamingo_kernels.commands.gpu import plan as plans
from flamingo_kernels.commands.gpu import proofs, report, work
from flamingo_kernels.commands.gpu import run as module
from flamingo_kernels.commands.gpu.plan import Plan, Time
from flamingo_kernels.commands.gpu.run import run
from flamingo_kernels.ops.gated_residual import config, triton_fwd
from flamingo_kernels.testing import CASES, GatedResidualCase
from tests.flamingo_kernels.commands.gpu.test_proofs import SMALL, stubs  # noqa: F401

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="Triton's interpreter is off")

GATED = [GatedResidualCase(shape=(3, 40))]
STEPS = list(plans.FULL.steps)


def timed(op, *modes):
    return tuple(case for case in shapes.QUICK if case.op == op and case.mode in modes)


LARGE = {case.operator for case in plans.FULL.large}

PLAN = Plan(
    cases=GATED,
    dtypes=(torch.float32,),
    repeated=GATED,
    large=GATED,
    timed=timed("gated_residual", "forward"),
    against=("eager", "torch.add"),
    seconds_each=0,
    steps=dict.fromkeys(STEPS, Time(math.inf)),
    seconds=300,
)


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no sanitizer
    monkeypatch.setattr(work, "ceilings", lambda device, clock: Ceilings(1.0, 2.0))


@pytest.fixture
def gated(monkeypatch, stubs, quick_ceilings):  # noqa: F811
    """The library has one operator, the quickest."""
    monkeypatch.setattr(dispatch, "_OPERATORS", {"gated_residual": dispatch._OPERATORS["gated_residual"]})


def gate(changes=None, **options):
    return run(dataclasses.replace(PLAN, **(changes or {})), "cpu", clock=lambda call, last: 2.0, **options)


def statuses(outcome, check):
    return {each.backend: each.status for each in outcome.findings if each.check == check}


def test_all_is_right_and_in_order(gated):
    told = []
    outcome = gate(say=told.append)
    assert outcome.failures == []
    assert [text for text in told if text in STEPS] == list(outcome.seconds) == STEPS
    kernels = {each.backend for each in outcome.findings if each.check == "repeats"}
    assert "triton/interpreter" in kernels
    assert statuses(outcome, "parity") == dict.fromkeys([*kernels, "reference"], "ok")
    for check in ("another stream", "another device", "graph", "past 2^31 elements"):
        assert statuses(outcome, check) == dict.fromkeys(kernels, "ok")
    assert set(statuses(outcome, "sanitizer memcheck").values()) == {"skipped"}
    assert {info.variant(backend) for backend in outcome.launches["gated_residual"]} == kernels
    assert all(spent > 0 for spent in outcome.launches["gated_residual"].values())
    ours = outcome.bench.rows[0]
    assert (ours.contender, ours.variant) == (OURS, "triton/interpreter")
    assert ours.floor_share == pytest.approx(3 * 32 * 64 * 4 / 1e9 / 2e-3)


def test_every_operator_is_proved_and_timed_in_the_interpreter(stubs, quick_ceilings, monkeypatch):  # noqa: F811
    able = lambda _, operator: {"triton": True, "reference": True}  # noqa: E731
    monkeypatch.setattr(module.check, "backends_on", able)
    outcome = gate(
        {
            "cases": SMALL,
            "repeated": [],
            "steps": {name: PLAN.steps[name] for name in ("build", "parity", "floors", "bench", "large")},
            "large": [case for case in SMALL if case.operator in LARGE],
            "timed": tuple(case for case in shapes.QUICK if case.op in CASES and case.mode == "forward"),
        }
    )
    assert outcome.failures == []
    for check, operators in (("parity", set(CASES)), ("past 2^31 elements", LARGE)):
        proved = [each for each in outcome.findings if each.check == check and each.status == "ok"]
        assert {each.operator for each in proved if each.backend == "triton/interpreter"} == operators
    ours = [row for row in outcome.bench.rows if row.contender == OURS]
    variants = {row.op: row.variant for row in ours}
    assert variants.pop("linear") != "triton/interpreter"  # "auto" there is a product of the processor's
    assert variants == dict.fromkeys(set(CASES) - {"linear"}, "triton/interpreter")


@pytest.fixture
def wrong_kernel(gated, monkeypatch):
    right = triton_fwd.gated_residual_fwd
    monkeypatch.setattr(triton_fwd, "gated_residual_fwd", lambda *tensors: right(*tensors) * 1.01)


def test_a_wrong_kernel_fails_parity_and_has_no_time(wrong_kernel):
    outcome = gate()
    assert statuses(outcome, "parity")["triton/interpreter"] == "failed"
    assert statuses(outcome, "parity")["reference"] == "ok"
    assert statuses(outcome, "graph")["triton/interpreter"] == "ok", "the other steps go on"
    assert outcome.bench.rows == []
    failures = "\n".join(outcome.failures)
    assert "parity, gated_residual, triton/interpreter, float32, shape=(3,40): error of out" in failures
    assert "bench gated_residual rows32 D64 float32 forward: relative error" in failures


def test_a_wrong_rival_and_one_that_is_not_there_fail_nothing(quick_ceilings, monkeypatch):
    right = baselines._sdpa
    monkeypatch.setattr(baselines, "_sdpa", lambda *tensors: right(*tensors) * 1.01)
    outcome = gate(
        {
            "cases": [],
            "repeated": [],
            "large": [],
            "timed": timed("masked_cross_attention", "forward"),
            "against": ("eager", "sdpa", "flash-attn"),
        }
    )
    assert [row.contender for row in outcome.bench.rows] == [OURS, "eager"]
    assert {each.contender: each.refused for each in outcome.bench.skipped} == {
        "sdpa": True,
        "flash-attn": False,
    }
    assert outcome.failures == []
    summary = report.summary(outcome)
    assert "sdpa REFUSED: relative error" in summary
    assert "flash-attn skipped: ModuleNotFoundError: No module named 'flash_attn' (1x)" in summary


@pytest.mark.slow
def test_a_step_without_time_leaves_it_to_the_others(gated):
    outcome = gate(
        {
            "steps": PLAN.steps | {"rivals": Time(0), "build": Time(0), "parity": Time(-1)},
            "backends": ("triton",),
        }
    )
    assert set(statuses(outcome, "parity").values()) == {"late"}
    assert set(statuses(outcome, "repeats").values()) == {"ok"}
    assert outcome.bench.rows
    assert outcome.failures == []
    assert outcome.late == len(statuses(outcome, "parity"))
    assert report.summary(outcome).endswith(
        "nothing that ran is wrong, but not all ran; 1 of 1 kernels ran; 2 not run for want of time"
    )


def test_all_steps_end_when_the_time_is_over(gated):
    outcome = gate({"seconds": -1, "backends": ("triton",)})
    proved = [each for each in outcome.findings if not each.check.startswith("sanitizer")]
    assert {each.status for each in proved} == {"late"}
    assert [each.reason for each in outcome.bench.skipped] == ["no time was left"]
    assert outcome.failures == ["gated_residual, triton: nothing of it ran, though it can run here"]
    assert "FAILED; 0 of 1 kernels ran" in report.summary(outcome)


@pytest.fixture
def built(tmp_path):
    """A build that is done."""

    class Built:
        log = tmp_path / "log.txt"

        def finish(self, end):
            return "CUDA kernels built for sm_90 in 31 s"

    Built.log.write_text("ptxas info    : Used 40 registers")
    return Built()


def test_what_came_of_the_build_is_told_and_kept(gated, built, monkeypatch):
    able = {"cuda": True, "triton": True, "cpu": "a tensor is on cuda:0", "reference": True}
    monkeypatch.setattr(module.check, "backends_on", lambda *_: able)
    told = []
    outcome = gate(building=built, say=told.append, changes={"steps": dict.fromkeys(["build"], Time(9))})
    assert told == ["build", built.finish(0)] == ["build", *outcome.notes]
    assert report.summary(outcome).splitlines()[1] == built.finish(0)
    assert outcome.build == built.log.read_text()
    assert outcome.problems == {}


def test_without_nvcc_kernels_are_missed_and_nothing_is_wrong(gated, monkeypatch):
    able = {"cuda": "the CUDA kernels are not built", "triton": True, "reference": True}
    monkeypatch.setattr(module.check, "backends_on", lambda *_: able)
    outcome = gate({"steps": dict.fromkeys(["build", "parity"], Time(99))}, building="no nvcc")
    assert outcome.failures == []
    shown = report.summary(outcome)
    assert "did not run: cuda: the CUDA kernels are not built (gated_residual)" in shown
    assert shown.endswith("nothing that ran is wrong, but not all ran; 1 of 2 kernels ran")


def test_with_nvcc_a_kernel_that_does_not_run_is_a_problem(gated, built, monkeypatch):
    able = {"cuda": "an undefined symbol", "triton": True, "reference": True}
    monkeypatch.setattr(module.check, "backends_on", lambda *_: able)
    outcome = gate({"steps": dict.fromkeys(["build", "parity"], Time(99))}, building=built)
    assert outcome.failures == ["gated_residual, cuda: it does not run here: an undefined symbol"]
    assert report.summary(outcome).endswith("FAILED; 1 of 2 kernels ran")


def test_every_configuration_is_timed_and_told_apart(gated):
    outcome = gate({"steps": dict.fromkeys(["build", "configs"], Time(99))})
    rows = [each for each in outcome.configs if each["kernel"] == "_gated_residual_bwd_kernel"]
    choice = config.backward(64, torch.float32)
    assert [each["config"] for each in rows] == [dataclasses.asdict(each) for each in choice.candidates]
    assert [each["default"] for each in rows].count(True) == 1
    assert {each["median_ms"] for each in outcome.configs} == {2.0}
    assert {(each["op"], each["dtype"]) for each in outcome.configs} == {("gated_residual", "float32")}
    assert {each["registers"] for each in outcome.configs} == {None}, "an interpreter has no registers"


def test_the_time_of_a_call_is_told_by_kernel(gated):
    outcome = gate({"steps": dict.fromkeys(["build", "kernels"], Time(99))})
    able = {backend for backend, yes in outcome.able["gated_residual"].items() if yes is True}
    assert {each["backend"] for each in outcome.kernels} == able
    assert all(each["microseconds"] > 0 and each["launches"] >= 1 for each in outcome.kernels)


# Without linear, which asks for a kernel of CUDA only by name.
@pytest.mark.parametrize("case", [case for case in shapes.QUICK if not case.op.startswith("linear")], ids=str)
def test_compiling_rivals_loads_no_kernel_of_ours(case, monkeypatch):
    """Those of CUDA are being built meanwhile, and a process asks for them once."""
    asked = []
    monkeypatch.setattr(cuda, "why_not", lambda: asked.append("why not") or "not yet")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("compile", "flex"):
        prepare((case, name, "cpu"))
    assert asked == []
    contenders(case)[OURS]().call()
    assert asked, "this test can fail"


def test_an_operator_without_a_kernel_here_is_left_out(stubs, quick_ceilings, monkeypatch):  # noqa: F811
    missing = {"gated_block_decode": "no kernel"}
    able = lambda _, operator: {"triton": missing.get(operator, True), "reference": True}  # noqa: E731
    monkeypatch.setattr(module.check, "backends_on", able)
    decode = [CASES["gated_block_decode"]()]
    changes = {
        "cases": decode,
        "repeated": decode,
        "large": [],
        "timed": timed("gated_block_decode", "forward"),
    }
    outcome = gate(changes)
    assert outcome.failures == ["gated_block_decode, triton: it does not run here: no kernel"]
    assert statuses(outcome, "parity") == {"reference": "ok"}
    assert outcome.bench.rows == []
    (shape,) = outcome.dropped
    assert shape.startswith("gated_block_decode B2 M3 D32")
    assert f"not timed, as it has no kernel here: {shape}" in report.summary(outcome)


def test_a_step_that_breaks_stops_no_other(gated, monkeypatch):
    def broken(device, clock):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(work, "ceilings", broken)
    outcome = gate()
    assert [line.partition("large: ")[2] for line in outcome.failures] == ["RuntimeError: no such kernel"]
    assert outcome.bench.rows[0].floor_share is None


def test_an_operator_without_a_kernel_is_a_failure(gated, monkeypatch):
    able = {"triton": "triton is not installed", "reference": True}
    monkeypatch.setattr(module.check, "backends_on", lambda *_: able)
    outcome = gate({"timed": ()})
    assert outcome.failures == ["gated_residual, triton: it does not run here: triton is not installed"]
    assert statuses(outcome, "parity") == {"reference": "ok"}


@pytest.mark.parametrize(
    "plan", [plans.FULL, plans.QUICK, plans.REHEARSAL], ids=["full", "quick", "rehearsal"]
)
def test_every_plan_covers_every_operator(plan):
    for cases in (plan.cases, plan.repeated):
        assert {case.operator for case in cases} == set(CASES)
    assert {case.op for case in plan.timed} >= set(CASES)


def test_the_cases_take_every_branch():
    def values(operator, *names):
        cases = [case for case in plans.FULL.cases if case.operator == operator]
        return {tuple(getattr(case, name) for name in names) for case in cases}

    masked, perceiver = "masked_cross_attention", "perceiver_attention"
    for operator in (masked, perceiver):
        assert values(operator, "head_dim") >= {(16,), (40,), (64,), (80,), (96,), (128,), (256,)}
        assert values(operator, "layout") >= {("contiguous",), ("slice",), ("transposed",), ("strided",)}
        assert max(values(operator, "groups")) > (1,)
    rules = values(masked, "immediate", "policy", "times")
    assert len(rules) >= 12
    for size in ("batch", "length", "media"):
        assert (0,) in values(masked, size)
    assert (256,) in values(masked, "latents")
    assert {(0,), (7680,)} <= values(perceiver, "features")
    assert {each.operator for each in plans.FULL.large} == set(CASES) - {"gated_block_decode", "linear"}


@pytest.mark.parametrize(
    ("plan", "limit"),
    [(plans.FULL, 500), (plans.QUICK, 185), (plans.CONFIGS, 250)],
    ids=["full", "quick", "configs"],
)
def test_each_step_fits_into_the_whole_and_a_hanging_task_into_its_step(plan, limit):
    assert set(plan.steps) <= set(STEPS)
    assert sum(each.step for each in plan.steps.values()) <= plan.seconds < limit
    for name, each in plan.steps.items():
        if name not in ("build", "sanitizer"):  # which end themselves
            assert each.task < each.step


def test_what_the_first_minutes_must_bring_comes_first():
    first = ["rivals", "build", "parity", "floors", "bench", "configs", "kernels"]
    assert list(plans.FULL.steps)[: len(first)] == first


def test_the_proofs_of_the_steps_are_all_the_proofs():
    assert {proof for step in module._PROOFS.values() for proof in step.proofs} == set(proofs.PROOFS)
