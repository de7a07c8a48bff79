"""The page "Prove and time it on a GPU": its tables and numbers are those of the code."""

import re

from flamingo_kernels.commands.gpu import GRACE, report
from flamingo_kernels.commands.gpu.outcome import Outcome
from flamingo_kernels.commands.gpu.plan import CONFIGS, FULL, QUICK
from tests.helpers import ROOT

PAGE = (ROOT / "docs/gpu.md").read_text()


def first_cells(title: str) -> list[str]:
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| (`.+?`|[a-z0-9 ]+) \|", section, flags=re.MULTILINE)


def test_its_steps_are_those_of_the_plan():
    assert first_cells("The steps")[1:] == list(FULL.steps)


def test_its_files_are_those_that_are_written(tmp_path):
    report.save(
        Outcome({"device": "a GPU", "on": "cuda:0", "time": "", "versions": {"torch": "2"}}), tmp_path
    )
    named = {name.strip("`") for cell in first_cells("What to send back")[1:] for name in cell.split(", ")}
    assert named == {path.name for path in tmp_path.iterdir()} | {"bench.png"}


def test_it_ends_when_it_says():
    assert FULL.seconds + GRACE <= 500 < 9 * 60
    assert QUICK.seconds + GRACE <= 3 * 60 + 5
    assert CONFIGS.seconds + GRACE <= 250
    for said in ("under nine minutes", "after at most 500 seconds", "in three minutes", "in 250 seconds"):
        assert said in PAGE
