"""Autotuning: off unless asked for, once a key, kept on disk, never wrong when the disk is."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is optional")

from flamingo_kernels import gated_residual, masked_cross_attention
from flamingo_kernels._backends import env
from flamingo_kernels._backends.triton import tuning
from flamingo_kernels._backends.triton.config import Choice, Config
from flamingo_kernels.testing import GatedResidualCase, MaskedCrossAttentionCase

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Size(Config):
    block: int


SLOW, FAST, BROKEN = Size(block=1), Size(block=2), Size(block=3)
CHOICE = Choice.of(SLOW, FAST, BROKEN, key=(64, "bfloat16"))
TIMES = {SLOW: 2.0, FAST: 1.0, BROKEN: float("inf")}


def kernel():
    """Has a name, as kernels do."""


class Clock:
    """Knows how long each configuration takes, and what was asked."""

    def __init__(self) -> None:
        self.running: Config | None = None
        self.measured: list[Config] = []

    def run(self, config: Config) -> None:
        self.running = config

    def measure(self, call) -> float:
        call()
        self.measured.append(self.running)
        return TIMES[self.running]


@pytest.fixture
def clock(monkeypatch, tmp_path) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "measure", clock.measure)
    monkeypatch.setattr(tuning, "_FOUND", {})
    monkeypatch.setattr(env, "CACHE", tmp_path)
    return clock


def choose(clock: Clock, choice: Choice = CHOICE) -> Config:
    return tuning.choose(kernel, choice, clock.run, CPU)


def test_the_fastest_is_taken_and_measured_once(clock):
    assert choose(clock) == FAST
    assert clock.measured == [SLOW, FAST, BROKEN]
    assert choose(clock) == FAST
    assert len(clock.measured) == 3


def test_another_process_reads_what_this_one_found(clock, monkeypatch):
    choose(clock)
    monkeypatch.setattr(tuning, "_FOUND", {})
    assert choose(clock) == FAST
    assert len(clock.measured) == 3


@pytest.mark.parametrize("content", ["", "{", '{"key": "another", "config": {"block": 1}}'])
def test_a_broken_file_is_measured_anew(content, clock, monkeypatch, tmp_path):
    choose(clock)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content)
    monkeypatch.setattr(tuning, "_FOUND", {})
    assert choose(clock) == FAST
    assert len(clock.measured) == 6
    assert json.loads(path.read_text())["config"]["block"] == 2


def test_a_folder_that_cannot_be_written_costs_nothing_else(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(env, "CACHE", tmp_path / "file")
    assert choose(clock) == FAST


@pytest.mark.parametrize("part", ["torch", "triton", "sources", "key", "candidates"])
def test_what_may_change_the_answer_is_in_the_key(part, clock, monkeypatch):
    choose(clock)
    choice = CHOICE
    if part == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    elif part == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    elif part == "sources":
        monkeypatch.setattr(tuning, "_sources", lambda: "other")
    elif part == "key":
        choice = Choice.of(SLOW, FAST, BROKEN, key=(128, "bfloat16"))
    else:
        choice = Choice.of(SLOW, FAST, key=CHOICE.key)
    choose(clock, choice)
    assert len(clock.measured) > 3


def test_one_candidate_is_not_measured(clock):
    assert choose(clock, Choice.of(SLOW, key=())) == SLOW
    assert not clock.measured


def test_nothing_is_tuned_unless_it_is_asked_for(clock):
    x = torch.randn(3, 40)
    gated_residual(x, x, torch.ones(1), backend="triton")
    assert not clock.measured


def test_the_length_of_the_text_is_in_no_key(clock, monkeypatch):
    """Tuned at one length, every other runs without a measurement."""
    monkeypatch.setattr(env, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "measure", lambda call: clock.measured.append(None) or 1.0)
    for operator, lengths in (("masked", (33, 64, 200)), ("gated", (8, 33, 200))):
        counts = []
        for length in lengths:
            if operator == "masked":
                case = MaskedCrossAttentionCase(batch=1, length=length, dtype=torch.bfloat16)
                masked_cross_attention(*case.tensors().values(), case.mask(), backend="triton")
            else:
                gated_residual(*GatedResidualCase(shape=(length, 40)).tensors().values(), backend="triton")
            counts.append(len(clock.measured))
        assert counts[0] == counts[-1] > 0, operator
