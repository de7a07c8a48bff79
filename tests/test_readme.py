"""What the README says about the code is true of the code."""

import json
import re
from pathlib import Path

import pytest

import flamingo
import flamingo_kernels
from flamingo.__main__ import main as flamingo_command
from flamingo.config import PRESETS
from flamingo.demo import stages
from flamingo_kernels._backends import dispatch, env
from flamingo_kernels.commands import support
from flamingo_kernels.commands.bench import report
from flamingo_kernels.commands.bench.rows import Run
from flamingo_kernels.commands.profile.run import INT8
from flamingo_kernels.patch.registry import families
from tests.helpers import ROOT

RESULTS = ROOT / "benchmarks/results/intel-xeon-2-cores"
BENCH = ROOT / "benchmarks/results/intel-xeon-2-cores/bench.json"
README = (ROOT / "README.md").read_text()


def test_its_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the demo's digits are scikit-learn's")
    monkeypatch.chdir(tmp_path)
    flamingo.save_model(flamingo.Flamingo(stages.CONFIG), stages.make_processor(), "digits.safetensors")
    model = flamingo.Flamingo(flamingo.FlamingoConfig.preset("tiny"))
    names = {"model": model}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)
    assert isinstance(model.cross_attn["0"], flamingo_kernels.GatedCrossAttentionBlock)
    assert names["out"].shape == (1, 4, 8, 64)


@pytest.mark.slow
def test_its_captions_and_answers_are_those_of_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert flamingo_command(["demo"]) == 0
    python, printed = re.findall(r"```(?:python)?\n(.*?)```", section("A Flamingo from nothing"), re.DOTALL)[
        1:3
    ]
    capsys.readouterr()
    exec(python, {})
    assert capsys.readouterr().out == printed


def section(title):
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_its_training_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    python, toml, commands = re.findall(r"```\w*\n(.*?)```", section("Train"), flags=re.DOTALL)
    exec(python, {})
    Path("run.toml").write_text(toml)
    assert commands.startswith("python -m flamingo train run.toml\n")
    assert flamingo_command(["train", "run.toml"]) == 0
    assert "20 steps done, the last checkpoint is run/checkpoints/step-00000020\n" in capsys.readouterr().out


def test_it_names_every_operator_and_backend():
    operators = re.findall(r"^\| `(\w+)\(", README, flags=re.MULTILINE)
    assert sorted(operators) == sorted(dispatch.operators())
    assert set(env.BACKENDS) <= set(re.findall(r"`(\w+)`", section("What runs where")))


def test_its_support_table_is_that_of_the_code():
    shown = README.partition(support.BEGIN)[2].partition(support.END)[0]
    assert shown.strip() == support.table(), "python -m flamingo_kernels support --readme README.md"


def test_its_models_are_those_of_the_code_and_its_gains_those_of_a_run():
    shown = README.partition(support.MODELS_BEGIN)[2].partition(support.MODELS_END)[0]
    make = f"python -m flamingo_kernels support --results {RESULTS.relative_to(ROOT)} --readme README.md"
    assert shown.strip() == support.models(RESULTS), make


def test_its_versions_are_those_of_the_known_code():
    shown = README.partition(support.VERSIONS_BEGIN)[2].partition(support.VERSIONS_END)[0]
    assert shown.strip() == support.versions(), "python -m flamingo_kernels support --readme README.md"
    assert "| flamingo-pytorch | 0.1.0 to before 0.1.2 |" in shown


def test_its_presets_are_those_of_a_run():
    shown = README.partition(support.PRESETS_BEGIN)[2].partition(support.PRESETS_END)[0]
    make = f"python -m flamingo_kernels support --results {RESULTS.relative_to(ROOT)} --readme README.md"
    assert shown.strip() == support.presets(RESULTS), make
    assert all(f"| {name} |" in shown for name in PRESETS)


def test_every_model_it_names_has_gains():
    assert list(support.PROFILED) == [f.name for f in families() if f.name in support.PROFILED]
    measured = {path.name for path in (RESULTS / "apart").iterdir()}
    assert {f"{name}.float32.1.json" for name in support.PROFILED.values()} <= measured
    for path in [*(RESULTS / "apart").iterdir(), *(RESULTS / "int8").iterdir()]:
        found = json.loads(path.read_text())
        assert path.stem == f"{found['model']}.{found['dtype']}.{found['sizes']['batch']}"
        assert "dirty" not in found["conditions"]["commit"], "nobody can run that again"
        for differences in found["differences"].values():
            assert differences.pop(INT8, 0) < 0.1
            assert max(differences.values()) < (1e-4 if found["dtype"] == "float32" else 5e-2)


def test_what_is_said_of_whole_models_is_what_was_measured():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    make = f"support --results {RESULTS.relative_to(ROOT)} --page benchmarks/README.md"
    for folder, begin, end in (
        ("apart", support.APART_BEGIN, support.APART_END),
        ("int8", support.INT8_BEGIN, support.INT8_END),
    ):
        shown = page.partition(begin)[2].partition(end)[0]
        assert shown.strip() == support.apart(RESULTS, folder), f"python -m flamingo_kernels {make}"


def test_its_real_size_is_that_of_a_run():
    shown = README.partition(support.REAL_BEGIN)[2].partition(support.REAL_END)[0]
    make = f"python -m flamingo_kernels support --results {RESULTS.relative_to(ROOT)} --readme README.md"
    assert shown.strip() == support.real(RESULTS), make
    (path,) = (RESULTS / "real").iterdir()
    found = json.loads(path.read_text())
    assert "dirty" not in found["conditions"]["commit"], "nobody can run that again"
    assert found["failed"] == {}
    for differences in found["differences"].values():
        assert differences.pop(INT8, 0) < 0.2
        assert max(differences.values()) < 5e-2


def test_every_preset_was_run_or_counted():
    assert {path.stem for path in (RESULTS / "models").iterdir()} == {"flamingo-small", *PRESETS}
    for path in (RESULTS / "models").iterdir():
        found = json.loads(path.read_text())
        assert found["model"] == path.stem
        if "lacking" in found:
            assert "in float64" in found["lacking"]
            continue
        assert list(found["works"]) == list(found["proofs"])
        assert found.get("by_block") or len(found["works"]) == 3
        proofs = [proof for by_side in found["proofs"].values() for proof in by_side.values()]
        assert len(proofs) == 2 * len(found["works"])
        assert all(proof["err"] <= proof["budget"] for proof in proofs)
        assert "dirty" not in found["conditions"]["commit"], "nobody can run that again"


def test_gains_are_ratios_of_times(tmp_path):
    def times(*each):
        return dict(zip(("median", "p20", "p80"), each, strict=True))

    def work(before, patched, linears):
        return {"before": before, "compile": before, "patch": patched, "linears": linears}

    name = "mllama-small.float32.1.json"
    found = json.loads((RESULTS / "apart" / name).read_text())
    found["times"] = {
        "prefill": work(times(3, 2.5, 3.5), times(2, 1.9, 2.1), times(1, 0.9, 1.1)),
        "decode": work(times(2, 1, 3), times(4, 2, 5), times(1, 0.5, 0.9)),
    }
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / name).write_text(json.dumps(found))
    table = support.models(tmp_path)
    assert "| 1.50x, 3.00x | ~0.50x, 2.00x | - | `row_leak`" in table
    assert table.count("| - | - | - |") == len(families()) - 1
    assert "Gains" not in support.models()
    speeds = {
        "before": times(1234.4, 1, 1),
        "patch": times(1300.0, 1, 1),
        "linears": times(1851.7, 1, 1),
    }
    assert support._speeds({"tokens_per_s": speeds}) == "1,234 to 1,852 (1.50x)"
    assert support.presets().count("\n") == 4


def test_a_file_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text(f"text {support.BEGIN} text")
    with pytest.raises(ValueError, match=f"expected one '{support.BEGIN}' and after it one '{support.END}'"):
        support.update_readme(tmp_path / "page.md")


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_speeds_are_those_of_a_run():
    shown = README.partition(report.BEGIN)[2].partition(report.END)[0]
    make = f"python -m flamingo_kernels bench --load {BENCH.relative_to(ROOT)} --readme README.md"
    assert shown.strip() == report.markdown(Run.load(BENCH)), make
    assert "dirty" not in report.conditions(Run.load(BENCH))


def test_bench_finds_its_markers():
    assert (README.count(report.BEGIN), README.count(report.END)) == (1, 1)
    assert README.index(report.BEGIN) < README.index(report.END)


def test_the_two_commands_come_first():
    assert re.match(r"# flamingo-kernels\n\n```\nmake demo .*\nmake test ", README)
