"""The page "Benchmark your own shapes": its tables are those of the code."""

import re

import pytest

from flamingo_kernels.commands.bench import asked, rival, run
from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.report import RIVALS
from flamingo_kernels.commands.bench.shapes import DIMENSIONS, Case
from tests.helpers import ROOT

PAGE = (ROOT / "docs/benchmarking.md").read_text()


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the table of a section, by each of the names in their first cell."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return {name.strip("`"): rest for first, *rest in cells[1:] for name in split(first)}


def split(names: str) -> list[str]:
    return re.findall("`([^`]+)`", names) or names.split(", ")


def test_it_has_the_dimensions_of_every_operator_and_what_a_rival_is_called_with():
    shown = rows("Your shape, dtype and threads")
    assert shown == {op: [asked.takes(op), ", ".join(rival.TAKES[op])] for op in DIMENSIONS}


def test_it_has_every_rival():
    assert sorted(rows("The rivals")) == sorted(RIVALS)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_its_rival_is_right(mode):
    (code,) = re.findall(r"^```python\n# mine.py\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    names = {}
    exec(code, names)
    sizes = {"B": 2, "T": 20, "M": 3, "H": 2, "d": 16, "R": 4}
    case = Case("masked_cross_attention", sizes, "float32", mode)
    sound, refused = run.check(case, ["eager"], rivals={"mine.py:attend": names["attend"]})
    assert not refused
    assert list(sound) == [OURS, "eager", "mine.py:attend"]
