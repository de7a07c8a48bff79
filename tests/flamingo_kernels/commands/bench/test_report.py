import csv
import dataclasses
import json
import sys
from itertools import pairwise

import pytest

from flamingo_kernels.commands.bench import report
from flamingo_kernels.commands.bench.baselines import OURS
from flamingo_kernels.commands.bench.rows import Key, Row, Run, Skipped
from flamingo_kernels.commands.bench.shapes import CASES, CASES_OF, GPU_CASES
from tests.helpers import ROOT
from tests.helpers.figures import texts_of

MASKED = Key("masked_cross_attention", "B1 T1024 M8 H8 d64 R64", "float32", "forward")
STEP = MASKED._replace(mode="forward+backward")
LARGE = STEP._replace(shape="B1 T2048 M32 H8 d64 R64")
ON_GPU = STEP._replace(shape="B32 T2048 M32 H8 d64 R64", dtype="bfloat16")
STORED = sorted(ROOT.glob("benchmarks/results/*/bench.json"))


def row(key, contender, median, *, ours=1.0, extra=0.5):
    return Row(
        *key,
        contender,
        median_ms=median,
        p20_ms=median * 0.9,
        p80_ms=median * 1.1,
        ratio=median / ours,
        extra_mib=extra,
        err=1e-7,
        budget=3e-7,
        variant="cpu/avx2" if contender == OURS else "",
        device="a processor",
        threads=2,
        torch="2.13.0",
        commit="abc1234",
        time="2026-01-02T03:04:05Z",
    )


@pytest.fixture
def outcome():
    return Run(
        rows=[
            row(MASKED, OURS, 1.0),
            row(MASKED, "eager", 22.0),
            row(MASKED, "sdpa", 6.0),
            row(STEP, OURS, 1.0, extra=0.5),
            row(LARGE, OURS, 1.0, extra=0.9),
        ],
        skipped=[
            Skipped(*MASKED, "compile", "InvalidCxxCompiler: none found", refused=False),
            Skipped(*LARGE._replace(dtype="bfloat16"), OURS, "relative error 1e-1", refused=True),
        ],
    )


def test_the_shapes_of_this_file_are_real():
    keys = {Key(case.op, case.shape, case.dtype, case.mode) for case in CASES}
    assert {MASKED, STEP, LARGE} <= keys
    assert ON_GPU in {Key(case.op, case.shape, case.dtype, case.mode) for case in GPU_CASES}


def test_targets_are_judged_by_the_measured_ratio(outcome):
    verdicts = report.verdicts(MASKED, outcome.cases[MASKED])
    assert [(str(verdict.target), verdict.met) for verdict in verdicts] == [
        ("at least 8x sdpa", False),
        ("at least 15x eager", True),
    ]
    assert str(verdicts[0]) == "at least 8x sdpa: not met (6.00x)"


def test_a_floor_reads_the_other_way_round():
    key = Key("gated_residual", "rows4096 D2048", "float32", "forward")
    rows = {name: row(key, name, ms) for name, ms in ((OURS, 1.0), ("torch.add", 0.8), ("eager", 2.0))}
    floor, eager = report.verdicts(key, rows)
    assert str(floor) == "at most 1.1x as long as torch.add: not met (1.25x)"
    assert str(eager) == "at least 1.8x eager: met (2.00x)"


def test_the_better_of_two_rivals_counts():
    key = MASKED._replace(dtype="bfloat16")
    rows = {name: row(key, name, median) for name, median in ((OURS, 1.0), ("sdpa", 9.0), ("eager", 7.0))}
    (verdict,) = report.verdicts(key, rows)
    assert str(verdict) == "at least 8x the better of sdpa and eager: not met (7.00x)"
    del rows["eager"]
    assert report.verdicts(key, rows) == []


def on_gpu(share, **medians):
    rows = [row(ON_GPU, OURS, 1.0), *(row(ON_GPU, name, median) for name, median in medians.items())]
    return [
        dataclasses.replace(each, device_type="cuda", floor_share=share / each.median_ms) for each in rows
    ]


def test_a_gpu_has_targets_of_its_own():
    rows = {each.contender: each for each in on_gpu(0.66, eager=41.0, sdpa=15.0, flex=1.4)}
    assert [str(verdict) for verdict in report.verdicts(ON_GPU, rows)] == [
        "at least 40x eager: met (41.0x)",
        "at least 15x sdpa: met (15.0x)",
        "at least 1.5x flex: not met (1.40x)",
        "at least 70% of the byte floor: not met (66%)",
    ]
    unmeasured = dataclasses.replace(rows[OURS], floor_share=None)
    assert report.verdicts(ON_GPU, {OURS: unmeasured}) == []
    assert report.verdicts(ON_GPU, {OURS: dataclasses.replace(unmeasured, device_type="cpu")}) == []


def test_no_case_has_two_sets_of_targets():
    for cases in CASES_OF.values():
        keys = [Key(case.op, case.shape, case.dtype, case.mode) for case in cases]
        assert len(keys) == len(set(keys))


def test_a_rival_of_gpus_has_a_column_where_it_was_timed(outcome):
    found = Run(on_gpu(0.66, eager=41.0, flex=1.4), [])
    head, _, line, *_ = report.markdown(found).splitlines()
    assert head == "| | dtype | mode | ours | eager | SDPA | compile | flex | target |"
    assert "| 1 ms | 41.0x | - | - | 1.40x | at least 40x eager: met" in line
    assert "threads" not in report.conditions(found)
    assert "flex" not in report.markdown(outcome)


def test_the_brief_table_has_a_line_a_case_and_what_was_left_out(outcome):
    head, *lines = report.brief(Run(on_gpu(0.66, eager=41.0, flex=1.4), outcome.skipped)).splitlines()
    assert head.split()[-7:] == ["eager", "sdpa", "compile", "flex", "torch.add", "products", "read"]
    assert lines[0].split()[-10:] == ["1", "ms", "66%", "41.0x", "-", "-", "1.40x", "-", "-", "-"]
    assert lines[1].strip().startswith("at least 40x eager: met (41.0x); at least 1.5x flex: not met")
    assert lines[2:] == [
        "compile skipped: InvalidCxxCompiler: none found (1x)",
        f"{OURS} REFUSED: relative error 1e-1 (1x)",
    ]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_results_can_be_read(path):
    run = Run.load(path)
    assert all(row.device_type in CASES_OF for row in run.rows)
    assert [row for row in run.rows if row.contender == OURS]


def test_memory_may_not_grow_with_the_shape(outcome):
    assert "does not grow with T * M: met (0.5 MiB at B1 T1024 M8" in report.memory_verdict(outcome)
    outcome.rows.append(row(LARGE._replace(shape="B4 T1024 M8 H8 d64 R64"), OURS, 1.0, extra=112.0))
    assert "not met" in report.memory_verdict(outcome)
    assert report.memory_verdict(Run(outcome.rows[:4], [])) == ""


def test_the_table_shows_rows_verdicts_and_what_is_missing(outcome):
    table = report.table(outcome)
    lines = [line.split() for line in table.splitlines()]
    assert [line[0] for line in lines[1:4]] == [OURS, "sdpa", "eager"]  # ours, then from the fastest on
    assert "6 ms (5.4 to 6.6)" in table
    assert "at least 8x sdpa: not met (6.00x)" in table
    assert "compile           skipped: InvalidCxxCompiler: none found" in table
    assert f"{OURS} REFUSED: relative error 1e-1" in table
    assert (
        "a processor, 2 threads, torch 2.13.0, backend cpu/avx2, commit abc1234, 2026-01-02T03:04:05Z"
        in table
    )


def test_markdown_has_a_line_for_every_case(outcome):
    lines = report.markdown(outcome).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 3
    assert rows[0] == (
        "| `masked_cross_attention` B1 T1024 M8 | float32 | forward | 1 ms | 22.0x | 6.00x | - | "
        "at least 8x sdpa: not met (6.00x)<br>at least 15x eager: met (22.0x) |"
    )
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}


def test_a_rival_of_the_users_has_a_column_and_a_bar(outcome, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    own = [dataclasses.replace(outcome.rows[1], contender=f"mine.py:{name}", ratio=9.0) for name in "ab"]
    found = Run(own + outcome.rows, [])
    head, _, line, *_ = report.markdown(found).splitlines()
    assert head.endswith("| compile | `mine.py:a` | `mine.py:b` | target |")
    assert "| - | 9.00x | 9.00x |" in line
    report.picture(found, tmp_path / "x.png")
    bars = drawn[0].axes[0].patches
    assert [bar.get_width() for bar in bars] == [21.0, 5.0, 8.0, 8.0]
    places = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars)
    assert all(end < start for (_, end), (start, _) in pairwise(places))
    assert len({bar.get_facecolor() for bar in bars}) == 4


def test_a_table_for_a_spreadsheet_has_a_column_for_each_dimension(outcome, tmp_path):
    other = row(Key("linear", "rows1 D2048 out8192", "float32", "forward"), OURS, 1.0)
    Run([*outcome.rows[:1], other], []).save_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open() as file:
        head, masked, linear = csv.reader(file)
    assert head[:12] == ["op", *"BTMHdR", "rows", "D", "out", "dtype", "mode"]
    assert masked[:12] == [MASKED.op, "1", "1024", "8", "8", "64", "64", "", "", "", "float32", "forward"]
    assert linear[1:10] == [""] * 6 + ["1", "2048", "8192"]
    assert "shape" not in head


def test_a_stored_run_is_the_same_run(outcome, tmp_path):
    outcome.save_json(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == outcome
    assert json.loads((tmp_path / "run.json").read_text())["rows"][0]["op"] == MASKED.op


def test_a_later_run_replaces_the_cases_that_it_measured(outcome):
    ours = next(row for row in outcome.rows if row.contender == OURS)
    again = dataclasses.replace(ours, median_ms=0.5, commit="later", time="2100-01-01T00:00:00Z")
    other = dataclasses.replace(again, shape="another")
    skipped = [each for each in outcome.skipped if each.key != ours.key]
    found = outcome.updated(Run([again, other], []))
    assert list(found.cases) == [*outcome.cases, other.key]
    assert found.cases[ours.key] == {OURS: again}
    assert found.skipped == skipped
    assert f"commit {outcome.rows[0].commit}, later, 2100-01-01T00:00:00Z." in report.conditions(
        Run([*outcome.rows, again], [])
    )


def test_floors_have_columns_where_there_are_any(outcome):
    head = report.markdown(outcome).splitlines()[0]
    assert "products" not in head
    floor = dataclasses.replace(outcome.rows[0], contender="products", ratio=0.93)
    head, _, line, *_ = report.markdown(Run([*outcome.rows, floor], [])).splitlines()
    assert "| products |" in head
    assert "| 0.93x |" in line


def test_the_picture_has_a_bar_for_every_rival(outcome, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []

    class Figure(figure_module.Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(figure_module, "Figure", Figure)
    report.picture(outcome, tmp_path / "bench.png")
    (axes,) = figures[0].axes
    # From 1 on, so the width is the ratio less 1.
    assert [bar.get_width() for bar in axes.patches] == [21.0, 5.0]
    assert axes.get_xscale() == "log"
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_picture_says_of_what_it_is(outcome):
    texts = texts_of(lambda: report.picture(outcome, "x.png"))
    assert "masked_cross_attention" in texts
    assert "float32, forward" in texts
    said = texts.replace("\n", " ")
    assert report.conditions(outcome) in said
    assert "a processor, 2 threads, torch 2.13.0" in said


def test_in_the_picture_no_bar_lies_on_another_and_each_case_has_room_for_its_label(outcome):
    """Of six rivals, of one and of none."""
    ours, rival = outcome.rows[0], outcome.rows[1]

    def case(shape, rivals):
        rows = [ours, *(dataclasses.replace(rival, contender=name) for name in rivals)]
        return [dataclasses.replace(row, shape=shape) for row in rows]

    many = report.RIVALS[:6]
    found = Run([*case("B1", many), *case("B2", many[:1]), *case("B3", []), *case("B4", many)], [])
    places, ticks, height = report._places(found, report.RIVALS)
    assert [name for _, name in places.values()] == [*many, many[0], *many]
    assert [rows[OURS].shape for rows, _ in places.values()] == ["B1"] * 6 + ["B2"] + ["B4"] * 6
    ys = list(ticks)
    assert ys[0] == 2.5
    assert all(below - above >= 2 for above, below in pairwise(ys))
    assert height > max(places)


def test_a_picture_without_matplotlib_says_so(outcome, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[bench\]"'):
        report.picture(outcome, tmp_path / "bench.png")


def test_every_rival_and_floor_has_a_colour_of_its_own():
    assert set(report._COLOURS) == set(report.RIVALS)
    assert len(set(report._COLOURS.values())) == len(report.RIVALS)
