"""What is written can be read again, and the table says what was found."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from flamingo_kernels.commands import info
from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.floors import Ceilings
from flamingo_kernels.commands.bench.rows import Row, Run, Skipped
from flamingo_kernels.commands.bench.shapes import GPU_CASES
from flamingo_kernels.commands.gpu.outcome import Outcome
from flamingo_kernels.commands.gpu.plan import FULL, tasks
from flamingo_kernels.commands.gpu.report import draw, load, save, summary
from flamingo_kernels.testing import CASES, GatedResidualCase, Measurement

BACKENDS = dict.fromkeys(CASES, ("reference", "triton"))


def measured(spent):
    return Measurement("dq", error=spent * 3.0, rounding=1.0, ulp=1.0)


def row(case, name, median):
    return Row(
        case.op,
        case.shape,
        case.dtype,
        case.mode,
        name,
        *(median, 0.9 * median, 1.1 * median, median),
        extra_mib=1.0,
        err=1e-3,
        budget=1e-2,
        variant="triton" if name == OURS else "",
        device="a GPU",
        threads=1,
        torch="2.11.0",
        commit="abc1234",
        time="2026-01-02T03:04:05Z",
        device_type="cuda",
        least_bytes=10,
        floor_share=0.71 / median,
    )


def outcome(findings=(), rows=(), skipped=(), problems=None):
    versions = {"torch": "2.11.0", "triton": "3.6.0", "commit": None}
    environment = {"versions": versions, "device": "a GPU", "on": "cuda:0", "time": "2026-01-02T03:04:05Z"}
    bench = Run(list(rows), list(skipped))
    return Outcome(
        environment,
        list(findings),
        problems or {},
        {"parity": 12.3, "bench": 45.6},
        Ceilings(3000.0, 790.0),
        bench,
    )


def parity(spent, **changes):
    case = dataclasses.replace(GatedResidualCase(), **changes)
    task, _ = tasks("parity", [case], BACKENDS, "cpu", (case.dtype,))
    worst = measured(spent)
    return task.finding("ok" if worst.passed else "failed", worst=worst)


def test_the_share_of_a_budget_is_the_worst_of_its_cases():
    lines = summary(outcome([parity(0.25), parity(0.5, shape=(1, 2)), parity(0.125)])).splitlines()
    (line,) = [line for line in lines if line.startswith("gated_residual")]
    assert line.split() == ["gated_residual", "reference", "0.50", "(3", "ok)"]
    assert "FAILED" not in "".join(lines)


def test_a_failure_is_counted_and_shown():
    shown = summary(outcome([parity(0.25), parity(1.5, shape=(1, 2))]))
    assert "FAILED 1 of 2" in shown
    assert (
        "FAILED:\n  parity, gated_residual, reference, float32, shape=(1,2): "
        "error of dq 4.50e+00, budget 3.00e+00" in shown
    )
    assert shown.endswith("\nFAILED")


def test_what_was_skipped_says_why():
    task, _ = tasks("graph", [GatedResidualCase()], BACKENDS, "cpu", FULL.dtypes[:1])
    shown = summary(outcome([task.finding("skipped", "a cpu has no graphs"), task.finding("ok")]))
    assert "graph: 1 ok, 1 skipped (a cpu has no graphs)" in shown


def test_times_and_verdicts_are_those_of_the_rows():
    case = GPU_CASES[1]
    rows = [row(case, OURS, 0.5), row(case, "eager", 6.5), row(case, "flex", 0.7)]
    shown = summary(outcome(rows=rows)).splitlines()
    (at,) = [at for at, line in enumerate(shown) if line.startswith(f"{case.op} B8 T1024 M8 bfloat16 both")]
    assert shown[at].split()[-10:] == ["0.5", "ms", "142%", "6.50x", "-", "-", "0.70x", "-", "-", "-"]
    assert shown[at + 1].strip() == "at least 12x eager: not met (6.50x); at least 1.5x flex: not met (0.70x)"
    assert "this device reaches: copy 3000 GB/s, bfloat16 matrix product 790 TFLOP/s" in shown
    assert shown[-1] == "all ran and is right; 0 of 2 targets met"


def test_ours_without_a_time_is_a_failure_unless_there_was_no_time():
    key = (GPU_CASES[0].op, GPU_CASES[0].shape, "bfloat16", "forward")
    lines = [Skipped(*key, OURS, "no time was left", refused=False)]
    assert outcome(skipped=lines).failures == []
    lines += [
        Skipped(*key, OURS, "OutOfMemoryError: 9 GiB", refused=False),
        Skipped(*key, "sdpa", "why", True),
    ]
    assert outcome(skipped=lines).failures == [f"bench {' '.join(key)}: OutOfMemoryError: 9 GiB"]


def test_the_whole_of_the_largest_run_fits_a_short_terminal():
    """12,000 characters, of which the steps need some before it."""
    many = tasks("parity", FULL.cases, BACKENDS, "cpu", FULL.dtypes)
    many += tasks("graph", FULL.repeated, BACKENDS, "cpu", FULL.dtypes)
    findings = [task.finding("failed", "E" * 500) for task in many]
    rivals = (OURS, "eager", "sdpa", "compile", "flex", "flash-attn", "torch.add")
    rows = [row(case, name, 100.0) for case in GPU_CASES for name in rivals]
    skipped = [Skipped(*case_key(case), "cudnn", "E" * 500, refused=True) for case in GPU_CASES]
    shown = summary(outcome(findings, rows, skipped, {"floors": "E" * 500}))
    assert len(shown) < 11_000
    assert f"and {len(many) + 1 - 12} more" in shown


def case_key(case):
    return case.op, case.shape, case.dtype, case.mode


def test_what_is_written_can_be_read_again(tmp_path):
    rows = [row(GPU_CASES[1], name, median) for name, median in ((OURS, 0.5), ("eager", 6.5))]
    skipped = [Skipped(*case_key(GPU_CASES[1]), "flash-attn", "not there", refused=False)]
    one = outcome([parity(0.5), parity(float("nan"), shape=(1, 2))], rows, skipped, {"floors": "broken"})
    save(one, tmp_path / "new")
    other = load(tmp_path / "new")
    assert repr(other) == repr(one)  # NaN is not equal to itself
    assert summary(other) == summary(one)
    assert summary(one) in (tmp_path / "new" / "summary.md").read_text()
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {
        *("parity.json", "bench.json", "environment.json", "configs.json", "kernels.json"),
        *("summary.md", "build.txt"),
    }
    assert json.loads((tmp_path / "new" / "environment.json").read_text())["problems"] == {"floors": "broken"}


def test_the_picture_is_drawn_where_it_can_be(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    one = outcome(rows=[row(GPU_CASES[1], name, median) for name, median in ((OURS, 0.5), ("flex", 6.5))])
    draw(one, tmp_path)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw(one, tmp_path)
    assert not (tmp_path / "bench.png").exists()


def test_a_rehearsal_says_that_it_is_one():
    one = outcome()
    assert summary(one).startswith("a GPU, torch 2.11.0, triton 3.6.0, 2026")
    one.environment["on"] = "cpu"
    assert summary(one).startswith("A rehearsal, which says nothing about a GPU, on ")


def test_the_environment_has_what_info_shows():
    assert {"versions", "processor", "gpu", "backends"} <= set(info.collect())


def test_what_a_call_costs_the_host_is_shown_and_kept(tmp_path):
    launches = {"gated_residual": {"cuda": 5.25, "triton": 21.0}, "gated_block_decode": {}}
    told = dataclasses.replace(
        outcome(),
        launches=launches,
        notes=["no CUDA kernels: nvcc was not done"],
        able={"gated_residual": {"cuda": "not built", "triton": True}},
        configs=[{"kernel": "_sum_kernel", "median_ms": 0.5}],
        kernels=[{"kernel": "_sum_kernel", "microseconds": 500.0}],
        build="ptxas info    : Used 40 registers",
        stuck=True,
    )
    save(told, tmp_path)
    assert load(tmp_path) == told
    lines = summary(told).splitlines()
    assert lines[1] == "no CUDA kernels: nvcc was not done"
    line = "microseconds of the host for a small forward call: gated_residual cuda 5.2 triton 21.0"
    assert line in lines
