"""Autotuning: off unless asked for, once a key, kept on disk, never wrong when the disk is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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


def other_kernel():
    """Has another."""


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


def choose(clock: Clock, choice: Choice = CHOICE, kernel=kernel, device=CPU) -> Config:
    return tuning.choose(kernel, choice, clock.run, device)


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


@pytest.mark.parametrize("part", ["kernel", "device", "torch", "triton", "sources", "key", "candidates"])
def test_what_may_change_the_answer_is_in_the_key(part, clock, monkeypatch):
    monkeypatch.setattr(tuning, "device_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda", 0)
    choose(clock, device=device)
    choice, asking = CHOICE, kernel
    if part == "kernel":
        asking = other_kernel
    elif part == "device":
        device = torch.device("cuda", 1)
    elif part == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    elif part == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    elif part == "sources":
        monkeypatch.setattr(tuning, "_sources", lambda: "other")
    elif part == "key":
        choice = Choice.of(SLOW, FAST, BROKEN, key=(128, "bfloat16"))
    else:
        choice = Choice.of(SLOW, FAST, key=CHOICE.key)
    choose(clock, choice, asking, device)
    assert len(clock.measured) > 3


def test_nothing_is_measured_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(tuning, "device_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert choose(clock, device=device) == SLOW
    assert not clock.measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(clock, device=device) == FAST


def test_what_does_not_fit_on_the_device_is_never_the_fastest(monkeypatch):
    def refuse(call, **options):
        raise tuning.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(tuning.triton.testing, "do_bench", refuse)
    assert tuning.measure(lambda: None) == float("inf")


def test_a_file_is_whole_or_not_there(clock, monkeypatch, tmp_path):
    """A process that dies while it writes leaves nothing that another reads."""

    def die(self, text):
        self.open("w").write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        choose(clock)
    assert not list(tmp_path.rglob("*.json"))


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
