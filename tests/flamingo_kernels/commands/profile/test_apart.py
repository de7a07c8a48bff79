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
    assert "tiny, float32, 0.405 M random parameters; 2 x 48 tokens, 3 images" in shown
    found = json.loads(file.read_text())
    assert list(found["times"]) == [models.DECODE]
    assert list(found["times"][models.DECODE]) == list(EAGER)
    assert all(each["median"] > 0 for each in found["times"][models.DECODE].values())
    assert found["failed"] == {}
    assert all(0 <= each < 1e-5 for each in found["differences"][models.DECODE].values())
    gains = {line[2:26].strip(): "x" in line[62:71] for line in shown.splitlines() if line.startswith("  ")}
    assert gains == {report.TITLES[side]: side != run.BEFORE for side in EAGER}


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


def test_a_side_serves_until_its_end_is_closed():
    plan = models.plan("tiny", QUICK).only([models.PREFILL])
    with apart._process(plan, torch.float32, run.LINEARS) as end:
        numbers, peak = apart._ask(end, models.PREFILL)
        assert len(numbers) == apart.COMPARED
        assert peak is None or peak > 2**20
        assert apart._sample(end) > 0
        (child,) = apart.multiprocessing.active_children()
    child.join(20)
    assert not child.is_alive()


@pytest.mark.slow  # four processes
def test_what_does_not_fit_together_is_timed_beside_the_model_as_it_is(tmp_path, monkeypatch, capsys):
    """And generation, and folded weights."""
    monkeypatch.setattr(apart.Size, "fits", lambda size, sides, dtype, there: sides == 2)
    file = tmp_path / "found.json"
    asked = ["tiny", "--quick", "--apart", "--fold", "--new", "3", "--only", "generation", "training step"]
    assert cli.main(["profile", *asked, "--json", str(file)]) == 0
    assert "3 to generate" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["tokens"] == {models.GENERATION: 3, models.STEP: 48}
    assert set(found["times"][models.GENERATION]) == {*EAGER, apart.FOLDED}
    assert set(found["beside"][models.GENERATION]) == {run.PATCHED, run.LINEARS, apart.FOLDED}
    assert set(found["times"][models.STEP]) == set(EAGER)
    assert models.GENERATION not in found["differences"]
    assert all(peak > 2**20 for peak in found["peak"][models.STEP].values())


@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize(("sides", "gigabytes"), [(2, 3 + 4), (5, 4 * 3 + 4)])
def test_how_many_fit(sides, gigabytes, few):
    """Of 10**9 weights half are trained: in 16 bits 3 GB with gradients, and 4 while they are made."""
    size = apart.Size(10**9, 10**9 // 2, {models.STEP: 1})
    there = gigabytes * 10**9 + sides * apart.OVERHEAD - few
    assert size.fits(sides, torch.bfloat16, there) == (not few)


def test_one_that_does_not_fit_twice_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(apart.Size, "fits", lambda *_: False)
    assert cli.main(["profile", "tiny", "--quick", "--apart"]) == 2
    assert "does not fit twice" in capsys.readouterr().err


@pytest.mark.parametrize("side", EAGER)
def test_what_is_done_to_each(side):
    model = models.plan("tiny", QUICK).subject(torch.float32, "cpu").model
    classes = {type(module) for module in model.modules()}
    apart.SIDES[side](model)
    assert ({type(module) for module in model.modules()} == classes) == (side == run.BEFORE)
    assert any(isinstance(each, linears.Linear) for each in model.modules()) == (side == run.LINEARS)


def test_a_side_that_fails_says_why_and_the_others_go_on(monkeypatch):
    plan = Plan("says", QUICK, _fails)
    size = apart.Size(1, 0, {models.PREFILL: 48})
    sides = [run.BEFORE, run.PATCHED]
    found = apart.run(plan, size, dtype=torch.float32, seconds=0.1, sides=sides)
    assert found.times == {}
    assert found.failed[models.PREFILL] == dict.fromkeys(sides, "RuntimeError: no room for it")
    assert "prefill, patch, failed: RuntimeError: no room for it" in report.apart(found)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--new", "4"], "expected --new and --fold with --apart."),
        (["--fold"], "expected --new and --fold with --apart."),
    ],
)
def test_options_that_mean_nothing(options, expected, capsys):
    assert cli.main(["profile", "tiny", "--quick", *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--device", "meta"], ["--trace", "trace.json"], ["--picture", "x.png"]])
def test_what_it_cannot_do_is_refused(more, capsys):
    assert cli.main(["profile", "tiny", "--apart", *more]) == 2
    error = capsys.readouterr().err
    assert "expected --apart on a cpu, without --trace and --picture." in error or "got meta" in error


def test_a_difference_is_relative_to_the_result_as_it_is():
    before, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert apart._differences({run.BEFORE: before, run.PATCHED: other}) == {run.PATCHED: pytest.approx(0.1)}
    assert apart._differences({run.PATCHED: other}) == {}
