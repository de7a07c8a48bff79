"""How far a command is, and whether others use the machine."""

from __future__ import annotations

import pytest

from flamingo_kernels.commands.measure import busy, progress
from flamingo_kernels.commands.measure.text import time_left


def test_what_is_left_is_told_by_what_was_done(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.ProgressBar(5, seconds=60.0)
    bar("a: checking")
    now[0] += 500
    bar("a: timing")
    bar("b: checking")
    now[0] += 500
    bar("c: checking")
    lines = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["more than 5 min left", "more than 5 min left", "about 33 min left", "about 25 min left"]


def test_steps_of_all_lengths_say_nothing_of_the_rest(capsys):
    progress.ProgressBar(2)("a: building")
    assert capsys.readouterr().err.endswith("0/2  a: building\n")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_a_time_that_is_left(seconds, shown):
    assert time_left(seconds) == shown


def test_busy_cores_are_counted_from_the_ticks_of_all(tmp_path, monkeypatch):
    """Idle and waiting do not count, what was taken from a virtual machine does, guests do not twice."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 20 30 1000 500 1 2 3 40 50\ncpu0 0\n")
    monkeypatch.setattr(busy, "_STAT", stat)
    monkeypatch.setattr(busy.os, "sysconf", lambda name: 100)
    later = "cpu  40 25 35 1900 900 2 3 11 99 99\n"
    monkeypatch.setattr(busy.time, "sleep", lambda seconds: stat.write_text(later))
    assert busy.busy_cores(0.5) == pytest.approx(1.0)
    stat.unlink()
    assert busy.busy_cores(0) is None
