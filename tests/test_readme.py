"""What the README says about the code is true of the code."""

import re
from pathlib import Path

import pytest

import flamingo
import flamingo_kernels
from flamingo_kernels import _dispatch, _env, support
from flamingo_kernels.bench import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_python_runs():
    model = flamingo.Flamingo(flamingo.FlamingoConfig.preset("tiny"))
    names = {"model": model}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)
    assert isinstance(model.cross_attn["0"], flamingo_kernels.GatedCrossAttentionBlock)
    assert names["out"].shape == (1, 4, 8, 64)


def test_it_names_every_operator_and_backend():
    operators = re.findall(r"^\| `(\w+)\(", README, flags=re.MULTILINE)
    assert sorted(operators) == sorted(_dispatch.operators())
    section = README.partition("## What runs where")[2].partition("## ")[0]
    assert set(_env.BACKENDS) <= set(re.findall(r"`(\w+)`", section))


def test_its_support_table_is_that_of_the_code():
    shown = README.partition(support.BEGIN)[2].partition(support.END)[0]
    assert shown.strip() == support.table(), "python -m flamingo_kernels support --readme README.md"


def test_its_models_are_those_of_the_code():
    shown = README.partition(support.MODELS_BEGIN)[2].partition(support.MODELS_END)[0]
    assert shown.strip() == support.models(), "python -m flamingo_kernels support --readme README.md"


def test_a_file_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text(f"text {support.BEGIN} text")
    with pytest.raises(ValueError, match=f"expected one '{support.BEGIN}' and after it one '{support.END}'"):
        support.update_readme(tmp_path / "page.md")


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_bench_finds_its_markers():
    assert (README.count(report.BEGIN), README.count(report.END)) == (1, 1)
    assert README.index(report.BEGIN) < README.index(report.END)


def test_the_two_commands_come_first():
    assert re.match(r"# flamingo-kernels\n\n```\nmake demo .*\nmake test ", README)
