"""tune: what it measures, which product it calls the best, and where that is kept."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands import tune
from flamingo_kernels.commands.measure.timing import Spread
from flamingo_kernels.ops.linear import config


def found(best: dict[int, str], way: str = "forward") -> list[tune.Found]:
    return [tune.Found(torch.float32, way, rows, [], name) for rows, name in best.items()]


@pytest.mark.parametrize(
    ("best", "limits"),
    [
        ({1: "torch", 2: "cpu", 8: "cpu", 16: "onednn", 64: "onednn", 512: "torch"},
         [(1, "torch"), (8, "cpu"), (64, "onednn")]),
        ({1: "cpu", 8: "onednn", 64: "onednn"}, [(1, "cpu"), (None, "onednn")]),
        ({1: "torch", 8: "torch"}, []),
        ({1: "torch", 8: "cpu", 16: "torch"}, []),  # by chance
        ({1: "cpu", 8: "torch"}, [(1, "cpu")]),
        ({4: "onednn"}, [(None, "onednn")]),
    ],
)  # fmt: skip
def test_the_table_says_up_to_how_many_rows(best, limits):
    assert tune.summary(found(best)) == {"float32": {"forward": limits}}


def times(**medians: float) -> dict[str, Spread]:
    return {name: Spread(each, each, each) for name, each in medians.items()}


@pytest.mark.parametrize(
    ("shapes", "best"),
    [
        ([times(torch=2, cpu=1), times(torch=2, cpu=1.9)], "cpu"),
        ([times(torch=2, cpu=1), times(torch=2, cpu=2.2)], "torch"),  # it loses somewhere
        ([times(torch=2, cpu=1.9), times(torch=2, cpu=1.9)], "torch"),  # it gains too little
        ([times(torch=2, cpu=1.5, onednn=1)], "onednn"),
    ],
)
def test_the_best_gains_enough_and_loses_nowhere(shapes, best):
    assert tune._best(shapes) == best


def test_a_run_is_kept_for_later_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "OWN", tmp_path / "cache" / "linear.json")
    monkeypatch.setattr(tune, "SHAPES", ((8, 16), (24, 16)))
    monkeypatch.setattr(tune.dispatch, "KERNEL_DTYPES", (torch.float32,))
    monkeypatch.setattr(tune, "_best", lambda shapes: "onednn" if "onednn" in shapes[0] else "torch")
    config.forget()
    try:
        assert cli.main(["tune", "linear", "--rows", "2", "1", "--seconds", "0.001"]) == 0
        assert config.choose("dw", torch.float32, 1000) == "onednn"
    finally:
        monkeypatch.undo()
        config.forget()
    page = capsys.readouterr().out
    assert page.count("forward") == 2  # of each number of rows
    assert f"{config.processor()}: " in page
    kept = json.loads((tmp_path / "cache" / "linear.json").read_text())[config.processor()]
    assert kept["products"]["float32"]["dx"] == [[None, "onednn"]]
    assert kept["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda own: own.parent.write_text(""), "tune: {folder}: File exists\n"),
        (lambda own: own.mkdir(parents=True), "tune: {own}: Is a directory\n"),
        (
            lambda own: (own.parent.mkdir(), own.write_text("[" * 99_999)),
            "tune: linear: expected JSON in {own}",
        ),
    ],
)
def test_what_could_not_be_kept_is_not_measured(tmp_path, monkeypatch, capsys, make, line):
    own = tmp_path / "cache" / "linear.json"
    make(own)
    monkeypatch.setattr(config, "OWN", own)
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("it was measured"))
    try:
        assert cli.main(["tune", "linear"]) == 2
    finally:
        monkeypatch.undo()
        config.forget()
    said = capsys.readouterr().err
    assert said.startswith(line.format(own=own, folder=own.parent))
    assert said.count("\n") == 1


def test_a_file_that_is_named_changes_nothing_here(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "OWN", tmp_path / "own.json")
    monkeypatch.setattr(tune, "measure", lambda rows, seconds: iter([]))
    assert cli.main(["tune", "linear", "--out", str(tmp_path / "other.json")]) == 0
    assert not config.OWN.exists()
    assert config.processor() in json.loads((tmp_path / "other.json").read_text())


def test_every_product_is_measured_and_computes(monkeypatch):
    """On each direction torch's and oneDNN's, where there is one, and the kernel on few rows forward."""
    monkeypatch.setattr(tune, "SHAPES", ((8, 16),))
    monkeypatch.setattr(tune.dispatch, "KERNEL_DTYPES", (torch.bfloat16,))
    names = {(each.way, each.rows): set(each.times[0]) - {"onednn"} for each in tune.measure([1, 65], 0.001)}
    assert names == {
        ("forward", 1): {"torch", "cpu"},
        ("forward", 65): {"torch"},
        **{(way, rows): {"torch"} for way in ("dx", "dw") for rows in (1, 65)},
    }


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--seconds", "-1"], ["--seconds", "nan"]])
def test_a_number_out_of_range_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "linear", *arguments])
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}: expected " in capsys.readouterr().err
