"""`profile --apart`: each side in a process of its own."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands.profile import apart, models, report, run
from flamingo_kernels.commands.profile.subject import QUICK, Plan
from flamingo_kernels.patch import linears

EAGER = {side: apart.SIDES[side] for side in (run.BEFORE, run.PATCHED, run.LINEARS)}


def _fails(sizes):
    raise RuntimeError("no room for it\nand more")


def test_each_side_has_a_process_of_its_own(tmp_path, capsys):
    file = tmp_path / "found.json"
    asked = ["tiny", "--quick", "--apart", "--only", "decode", "--batch", "2", "--json", str(file)]
    assert cli.main(["profile", *asked]) == 0
    shown = capsys.readouterr().out
    assert "tiny, float32; 2 x 48 tokens, 3 images" in shown
    found = json.loads(file.read_text())
    assert list(found["times"]) == [models.DECODE]
    assert list(found["times"][models.DECODE]) == list(EAGER)
    assert all(each["median"] > 0 for each in found["times"][models.DECODE].values())
    assert found["failed"] == {models.DECODE: {}}
    assert all(0 <= each < 1e-5 for each in found["differences"][models.DECODE].values())
    for side in EAGER:
        assert report._TITLES[side] in shown


@pytest.mark.slow  # five processes
def test_integers_stand_beside_when_asked_for(tmp_path):
    file = tmp_path / "found.json"
    asked = ["tiny", "--quick", "--apart", "--quantize", "--json", str(file)]
    assert cli.main(["profile", *asked]) == 0
    found = json.loads(file.read_text())
    assert run.INT8 in found["times"][models.DECODE]
    assert run.INT8 in found["times"][models.PREFILL]
    assert run.INT8 not in found["times"][models.STEP]
    assert 1e-4 < found["differences"][models.DECODE][run.INT8] < 0.1


def test_a_side_serves_samples_until_its_end_is_closed():
    context = apart.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    plan = models.plan("tiny", QUICK).only([models.PREFILL])
    process = context.Process(
        target=apart._serve, args=(plan, torch.float32, models.PREFILL, run.LINEARS, 1, theirs), daemon=True
    )
    process.start()
    theirs.close()
    assert len(ours.recv()) == apart.COMPARED
    assert apart._sample(ours) > 0
    ours.close()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize("side", EAGER)
def test_what_is_done_to_each(side):
    model = models.plan("tiny", QUICK).subject(torch.float32, "cpu").model
    classes = {type(module) for module in model.modules()}
    apart.SIDES[side](model)
    assert ({type(module) for module in model.modules()} == classes) == (side == run.BEFORE)
    assert any(isinstance(each, linears.Linear) for each in model.modules()) == (side == run.LINEARS)


def test_a_side_that_fails_says_why_and_the_others_go_on(monkeypatch):
    plan = Plan("says", QUICK, _fails)
    found = apart.Apart("says", "float32", QUICK, {"device": "", "threads": 1, "torch": ""})
    sides = list(apart.SIDES)
    with apart._processes(plan, torch.float32, models.PREFILL, sides, lambda text: None) as found_here:
        calls, results, failed = found_here
        assert calls == results == {}
    assert failed == dict.fromkeys(apart.SIDES, "RuntimeError: no room for it")
    found.times["prefill"], found.failed["prefill"] = {}, failed
    assert "inductor, frozen failed: RuntimeError: no room for it" in report.apart(found)


@pytest.mark.parametrize("more", [["--device", "meta"], ["--trace", "trace.json"], ["--picture", "x.png"]])
def test_what_it_cannot_do_is_refused(more, capsys):
    assert cli.main(["profile", "tiny", "--apart", *more]) == 2
    error = capsys.readouterr().err
    assert "expected --apart on a cpu, without --trace and --picture." in error or "got meta" in error


def test_a_difference_is_relative_to_the_result_as_it_is():
    before, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert apart._differences({run.BEFORE: before, run.PATCHED: other}) == {run.PATCHED: pytest.approx(0.1)}
    assert apart._differences({run.PATCHED: other}) == {}


def test_the_table_has_a_line_a_work_and_marks_what_overlaps():
    def times(median):
        return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}

    made = {
        "model": "mine",
        "dtype": "float32",
        "sizes": {"text": 8, "media": 1, "batch": 8},
        "conditions": {"device": "X", "threads": 2, "torch": "2", "commit": "abc", "time": "2026-01-02T03"},
        "times": {"decode": {"before": times(4.0), "patch": times(3.9), "linears": times(2.0)}},
    }
    more = made | {"times": {"decode": made["times"]["decode"] | {"int8": times(1.0)}}, "dtype": "bfloat16"}
    table = report.apart_table([made])
    assert "| as it is | patch | patch with linears |\n" in table
    assert "| mine | float32 | decode | 8 | 4 ms | ~1.03x | 2.00x |" in table
    both = report.apart_table([more, made])
    assert "| mine | float32 | decode | 8 | 4 ms | ~1.03x | 2.00x | - |" in both
    assert "| mine | bfloat16 | decode | 8 | 4 ms | ~1.03x | 2.00x | 4.00x |" in both
    assert "X, 2 threads, torch 2, commit abc, 2026-01-02." in table
