"""`profile --apart`: each side in a process of its own."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands.profile import apart, models, report, run
from flamingo_kernels.commands.profile.subject import QUICK, Plan, Subject, Work
from flamingo_kernels.patch import linears

EAGER = {side: apart.SIDES[side] for side in (run.BEFORE, run.PATCHED, run.LINEARS)}


class Says(nn.Module):
    """Its result says where it ran."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self):
        return torch.tensor([os.getpid(), torch.get_num_threads()])


def _says(sizes):
    model = Says()
    return Subject(model, {}, {}, {models.PREFILL: Work(lambda model: model, 1)})


def _fails(sizes):
    raise RuntimeError("no room for it\nand more")


def test_each_side_has_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(apart, "SIDES", EAGER)
    file = tmp_path / "found.json"
    asked = ["tiny", "--quick", "--apart", "--only", "decode", "--batch", "2", "--json", str(file)]
    assert cli.main(["profile", *asked]) == 0
    shown = capsys.readouterr().out
    assert "tiny, float32; 2 x 48 tokens, 3 images" in shown
    assert shown.count("x\n") + shown.endswith("x") == 3, "a gain a side"
    found = json.loads(file.read_text())
    assert list(found["times"]) == [models.DECODE]
    assert list(found["times"][models.DECODE]) == list(EAGER)
    assert all(each["median"] > 0 for each in found["times"][models.DECODE].values())
    assert found["failed"] == {models.DECODE: {}}


def test_a_side_serves_samples_until_its_end_is_closed():
    context = apart.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    plan = models.plan("tiny", QUICK).only([models.PREFILL])
    process = context.Process(
        target=apart._serve, args=(plan, torch.float32, models.PREFILL, run.LINEARS, 1, theirs), daemon=True
    )
    process.start()
    theirs.close()
    assert ours.recv() == ""
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
    found = apart.Apart("says", "float32", QUICK, {"device": "", "threads": 1, "torch": ""}, {}, {})
    with apart._processes(plan, torch.float32, models.PREFILL, lambda text: None) as (calls, failed):
        assert calls == {}
    assert failed == dict.fromkeys(apart.SIDES, "RuntimeError: no room for it")
    found.times["prefill"], found.failed["prefill"] = {}, failed
    assert "inductor, frozen failed: RuntimeError: no room for it" in report.apart(found)


@pytest.mark.parametrize("more", [["--compile"], ["--trace", "trace.json"], ["--picture", "x.png"]])
def test_what_it_cannot_do_is_refused(more, capsys):
    assert cli.main(["profile", "tiny", "--apart", *more]) == 2
    assert "expected --apart on a cpu, without --compile, --trace and --picture." in capsys.readouterr().err
