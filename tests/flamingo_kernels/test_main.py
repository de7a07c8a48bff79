import csv
import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import flamingo_kernels
from flamingo_kernels import __main__ as cli
from flamingo_kernels import available_backends
from flamingo_kernels._backends import dispatch, env
from flamingo_kernels.commands import info, support
from flamingo_kernels.commands.bench import baselines, shapes
from flamingo_kernels.commands.bench import run as bench_run
from flamingo_kernels.commands.bench.rows import Run
from flamingo_kernels.commands.gpu import RESULTS, _folder, plan
from flamingo_kernels.testing import GatedResidualCase
from tests.helpers import ROOT


def python(*arguments, **environment):
    """`python -m flamingo_kernels` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "flamingo_kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_info_json_lists_every_operator_and_backend():
    done = python("info", "--json", FLAMINGO_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backends"] == {operator: available_backends(operator) for operator in dispatch.operators()}
    for operator, backends in found["backends"].items():
        libraries = ["mkl", "onednn"] if operator == "linear" else []
        assert list(backends) == [*env.BACKENDS, *libraries]
    assert found["versions"]["flamingo_kernels"] == flamingo_kernels.__version__
    assert found["environment"]["FLAMINGO_KERNELS_BACKEND"] == "reference"


def test_info_says_why_there_is_no_extension():
    done = python("info", FLAMINGO_KERNELS_EXTENSION="/nowhere/_C.so")
    assert done.returncode == 0, done.stderr
    assert "extension         none: the C++ extension is not built" in done.stdout
    assert "  cpu             the C++ extension is not built" in done.stdout
    assert "  reference       yes" in done.stdout


def test_info_page_has_what_the_json_has(capsys):
    assert cli.main(["info"]) == 0
    page, found = capsys.readouterr().out, info.collect()
    for expected in (info.processor_name(), found["versions"]["torch"], *dispatch.operators()):
        assert expected in page


def test_bench_writes_all_its_files_and_shows_them_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {option: tmp_path / f"bench.{option}" for option in ("json", "csv", "png")}
    page = tmp_path / "bench.md"
    asked = ["--quick", "--op", "gated_residual", "--against", "eager", "--seconds", "0"]
    written = ["--json", files["json"], "--csv", files["csv"], "--picture", files["png"], "--markdown", page]
    assert cli.main(["bench", *asked, *map(str, written)]) == 0
    shown = capsys.readouterr()
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["contender"], row["mode"]) for row in rows] == [
        (name, mode) for mode in ("forward", "forward+backward") for name in (baselines.OURS, "eager")
    ]
    for ours, eager in (rows[:2], rows[2:]):
        assert eager["ratio"] == eager["median_ms"] / ours["median_ms"]
        assert ours["ratio"] == 1
    with files["csv"].open() as file:
        table = list(csv.DictReader(file))
    assert [(row["rows"], row["D"], row["contender"]) for row in table] == [
        ("32", "64", row["contender"]) for row in rows
    ]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert page.read_text().splitlines()[2].startswith("| `gated_residual`")
    assert "2/2" not in shown.out, "progress belongs on stderr"
    assert "left  gated_residual" in shown.err.splitlines()[-1]

    assert cli.main(["bench", "--load", str(files["json"])]) == 0
    assert capsys.readouterr().out == shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["gpu", "check", "bench"])
def test_without_a_gpu_that_is_said_in_a_line(command, capsys):
    assert cli.main([command, "--device", "cuda"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{command}: there is no GPU here that torch can use: ")
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_gpu_takes_a_gpu_by_default(capsys, monkeypatch):
    monkeypatch.setattr(info, "why_not_on", lambda device: f"asked for {device}")
    assert cli.main(["gpu"]) == 2
    assert capsys.readouterr().err == "gpu: asked for cuda:0\n"


def test_gpu_rehearses_on_a_cpu_and_shows_it_again(tmp_path, capsys, monkeypatch):
    one = [GatedResidualCase(shape=(3, 40))]
    timed = tuple(case for case in shapes.QUICK if case.op == "gated_residual")
    small = {"cases": one, "repeated": one, "timed": timed, "dtypes": (torch.float32,)}
    monkeypatch.setattr(plan, "REHEARSAL", dataclasses.replace(plan.REHEARSAL, **small))
    monkeypatch.setattr(dispatch, "_OPERATORS", {"gated_residual": dispatch._OPERATORS["gated_residual"]})
    folder = tmp_path / "results"
    assert cli.main(["gpu", "--device", "cpu", "--out", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("A rehearsal, which says nothing about a GPU, on ")
    assert shown.out.endswith(f" kernels ran\nwritten to {folder}\n")
    assert "FAILED" not in shown.out
    assert [line.split()[2] for line in shown.err.splitlines()][:3] == ["rivals", "build", "parity"]
    assert cli.main(["gpu", "--load", str(folder)]) == 0
    assert capsys.readouterr().out == shown.out.removesuffix(f"written to {folder}\n")

    findings = json.loads((folder / "parity.json").read_text())
    findings[0]["status"] = "failed"
    (folder / "parity.json").write_text(json.dumps(findings))
    assert cli.main(["gpu", "--load", str(folder)]) == 1


def test_results_lie_under_the_name_of_their_device():
    assert _folder("cuda:0", "NVIDIA H100 80GB HBM3") == RESULTS / "nvidia-h100-80gb-hbm3"
    assert _folder("cpu", "AMD EPYC").parts[0] == "build", "which git ignores"


@pytest.mark.parametrize(
    ("asked", "line"),
    [("1", "triton          yes, in Triton's interpreter on the cpu"), ("0", "triton          ")],
)
def test_info_says_when_triton_is_interpreted(asked, line):
    pytest.importorskip("triton")
    page = python("info", TRITON_INTERPRET=asked).stdout
    assert f"TRITON_INTERPRET={asked}" in page
    assert f"\n  {line}" in page
    assert ("interpreter on the cpu" in page) is (asked == "1")


def test_info_shows_what_a_gpu_is(monkeypatch, capsys):
    facts = {"name": "NVIDIA H100", "major": 9, "minor": 0, "total_memory": 80 * 2**30}
    gpu = SimpleNamespace(**facts, multi_processor_count=132, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    assert cli.main(["info"]) == 0
    assert "gpu               NVIDIA H100 (sm_90, 80.0 GiB, 132 multiprocessors)" in capsys.readouterr().out
    assert info.why_not_on("cuda:0") == info.why_not_on("cpu") == ""
    assert info.why_not_on("cuda:1") == "there is no cuda:1 here, the number of GPUs is 1"


def test_bench_fails_when_our_result_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(baselines.fk, "gated_residual", lambda x, y, gate: x + gate * y)
    asked = ["--quick", "--op", "gated_residual", "--against", "eager", "--seconds", "0"]
    assert cli.main(["bench", *asked]) == 1
    out = capsys.readouterr().out
    assert "flamingo_kernels REFUSED: relative error" in out
    assert " ms " not in out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--op", "gated_attention"], "--op gated_attention is not one of masked_cross_attention, "),
        (["--against", "cudnn"], "--against cudnn is not one of eager, sdpa, compile, flex, flash-attn, "),
        (["--device", "mps"], "expected the device cpu or cuda:0, got mps"),
        (["--op", "decode step", "--against", "cudnn"], "--against cudnn is not one of"),
        (["--op", "decod_step"], "PerceiverResampler. Did you mean 'its decode step' or"),
        (
            ["--shape", "B2 T8"],
            "--shape 'B2 T8' is one of no operator. They take masked_cross_attention: B T M",
        ),
        (["--rival", "json:dumps"], "expected --op NAME with --rival"),
        (["--op", "linear", "--rival", "gone.py:f"], "expected a file of Python, found none at gone.py"),
        (["--load", "nowhere.json"], "bench: nowhere.json: No such file or directory"),
        (
            ["--load", "pyproject.toml"],
            "pyproject.toml: expected what `bench --json` has written, got a file",
        ),
        (["--json", "nowhere/x.json"], "bench: nowhere/x.json: No such file or directory"),
        (["--csv", "docs"], "bench: docs: Is a directory"),
        (["--picture", "x.text"], "bench: expected a picture named ."),
        (["--picture", "nowhere/x.png"], "bench: nowhere/x.png: No such file or directory"),
        (["--markdown", "nowhere/x.md"], "bench: nowhere/x.md: No such file or directory"),
    ],
)
def test_bench_says_before_the_work_what_it_cannot_do(asked, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "flamingo_kernels.commands.bench.run.run", lambda *_, **__: pytest.fail("it went to work")
    )
    assert cli.main(["bench", *asked]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "ops"),
    [
        ("its decode step", {"its decode step"}),
        ("decode", {"its decode step", "gated_block_decode"}),
        ("RESAMPLER", {"PerceiverResampler"}),
        ("linear", {"linear"}),
        ("int8", {"linear, int8"}),
    ],
)
def test_bench_finds_an_operator_by_a_part_of_its_name(asked, ops, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "flamingo_kernels.commands.bench.run.run", lambda cases, **_: taken.extend(cases) or Run([], [])
    )
    assert cli.main(["bench", "--quick", "--op", asked]) == 0
    assert {case.op for case in taken} == ops


def test_bench_times_what_is_the_users_own(tmp_path, monkeypatch, capsys):
    """Shape, dtype, threads and rival; what was found is saved after every case."""
    (tmp_path / "mine.py").write_text("def add(x, y, gate):\n    return x + gate.tanh() * y\n")
    saved, save = [], Run.save_json
    monkeypatch.setattr(Run, "save_json", lambda run, path: (saved.append(len(run.rows)), save(run, path)))
    monkeypatch.setattr("flamingo_kernels.commands.measure.busy.busy_cores", lambda: 1.5)
    threads = torch.get_num_threads()
    asked = ["--shape", "rows3 D8", "--dtype", "float16", "--threads", "1", "--seconds", "0"]
    rival = f"{tmp_path / 'mine.py'}:add"
    try:
        assert (
            cli.main(
                ["bench", *asked, "--against", "eager", "--rival", rival, "--json", str(tmp_path / "x.json")]
            )
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr()
    rows = Run.load(tmp_path / "x.json").rows
    assert {(row.op, row.shape, row.dtype, row.threads) for row in rows} == {
        ("gated_residual", "rows3 D8", "float16", 1)
    }
    assert {row.contender for row in rows} == {baselines.OURS, "eager", rival}
    assert saved == [3, 6, 6]
    assert shown.err.startswith("bench: others keep 1.5 cores of this machine busy: ")
    assert "0/2  more than 1 s left  gated_residual rows3 D8 float16 forward: checking" in shown.err
    assert "1/2  about " in shown.err


def test_bench_keeps_what_was_timed_before_ctrl_c(tmp_path, monkeypatch, capsys):
    calls, run_case = [], bench_run._run_case

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(*arguments)

    monkeypatch.setattr(bench_run, "_run_case", interrupted)
    asked = ["--quick", "--op", "gated_residual", "--against", "eager", "--seconds", "0"]
    assert cli.main(["bench", *asked, "--json", str(tmp_path / "x.json")]) == 130
    shown = capsys.readouterr()
    assert shown.err.endswith("bench: stopped by Ctrl-C after 1 cases, which are kept\n")
    assert "gated_residual" in shown.out
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2


def test_support_shows_tables_in_markdown(capsys):
    assert cli.main(["support"]) == 0
    shown = capsys.readouterr().out
    assert "| `masked_cross_attention` | `cpu` |" in shown
    assert "| flamingo-pytorch | 0.1.0 to before 0.1.2 |" in shown
    assert "open-flamingo 0.0.2 to 2.0.1, " in support.libraries()
    assert "whisper-flamingo main" in support.libraries()
    rows = [line.split(" | ") for line in support.backends().splitlines()[2:]]
    assert [row[0] for row in rows if row[-1] == "all |"] == [
        "| `reference`",
        "| `cpu`",
        "| `cuda`",
        "| `triton`",
    ]
    assert ["| `mkl`", "processors for which torch has it", "`linear` |"] in rows


def test_results_of_something_else_are_named(tmp_path, capsys):
    for content in ("{", "[]", "{}", "null", "[" * 10**5):
        (tmp_path / "environment.json").write_text(content)
        assert cli.main(["gpu", "--load", str(tmp_path)]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"gpu: {tmp_path}")
        assert ": expected " in shown.err
        assert (shown.err.count("\n"), shown.out) == (1, "")


def test_info_tells_of_a_build_that_failed_after_the_one_that_is_there(monkeypatch):
    line = "csrc/cuda/bindings.cpp does not compile: error: no such macro"
    monkeypatch.setattr(info.missing, "failed_build", lambda path: line)
    found = info.collect()
    assert found["extension"]["failed_build"] == found["cuda_extension"]["failed_build"] == line
    if found["extension"]["loaded"]:
        assert f"; the latest build failed: {line}" in info.render(found)
