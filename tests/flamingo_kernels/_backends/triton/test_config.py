"""Every configuration that a launch may choose computes the same, for every architecture's list."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from flamingo_kernels.testing import (
    Case,
    GatedResidualCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
    measure,
)

pytest.importorskip("triton", reason="the Triton backend is optional")

from flamingo_kernels._backends import env
from flamingo_kernels._backends.triton import tuning
from flamingo_kernels._backends.triton.config import Choice, Config, Device, count_splits, power_of_two
from flamingo_kernels.ops.gated_residual.config import rows_per_program
from tests.helpers import slow_unless
from tests.helpers.triton.cases import modules_that_ask

# of every kind one, and the one dtype that has lists of its own
LISTS = slow_unless(
    [("sm_90", torch.bfloat16), ("sm_90", torch.float32)],
    [*product(("sm_80", "sm_90", "gfx942"), [torch.bfloat16]), ("sm_90", torch.float32)],
)
CASES = [
    MaskedCrossAttentionCase(batch=1, length=75, latents=60, heads=2, head_dim=40),
    MaskedCrossAttentionCase(batch=1, length=75, latents=60, heads=2, head_dim=40, immediate=False),
    MaskedCrossAttentionCase(batch=1, length=9, latents=60, heads=2, head_dim=40),
    MaskedCrossAttentionCase(batch=1, length=75, latents=30, heads=1, head_dim=128, immediate=False),
    MaskedCrossAttentionCase(batch=1, length=75, latents=20, heads=1, head_dim=256, immediate=False),
    PerceiverAttentionCase(clips=1, queries=60, features=150, latents=60, heads=2, head_dim=40),
    PerceiverAttentionCase(clips=1, queries=60, features=150, latents=60, heads=2, groups=2, head_dim=40),
    PerceiverAttentionCase(clips=1, queries=60, features=150, latents=60, heads=1, head_dim=128),
    GatedResidualCase(shape=(77, 136)),
    GatedResidualCase(shape=(77, 136), gate=(136,)),
]


def test_a_block_holds_all_elements_and_a_dot_takes_it():
    sizes = (1, 16, 17, 32, 33, 63, 64, 65)
    assert [power_of_two(size) for size in sizes] == [16, 16, 32, 32, 64, 64, 64, 128]


def test_work_is_split_until_it_fills_the_device():
    device = Device("sm_90", 4)
    assert [count_splits(programs, 5, device) for programs in (0, 1, 2, 3, 4, 8, 9)] == [5, 5, 4, 2, 2, 1, 1]
    assert [count_splits(programs, 9, device, 3) for programs in (1, 2, 3, 4, 6, 7)] == [9, 6, 4, 3, 2, 1]
    assert count_splits(1, 0, device) == 1


def test_a_kernel_is_launched_with_its_sizes_and_options():
    assert Config(num_warps=8).keywords == {"num_warps": 8, "num_stages": 2}
    assert Config(maxnreg=128).keywords == {"num_warps": 4, "num_stages": 2, "maxnreg": 128}


def test_programs_share_all_rows():
    for rows, step, blocks, programs in product((1, 9, 64, 1001), (1, 4, 8), (1, 3), (1, 2, 7, 264)):
        mine = rows_per_program(rows, step, blocks, programs)
        assert mine % step == 0
        assert -(-rows // mine) * blocks <= max(programs, blocks)


def test_a_choice_has_its_default_first_and_nothing_twice():
    one, other = Config(num_warps=4), Config(num_warps=8)
    assert Choice.of(one, other, one, other, key=()).candidates == (one, other)


def pretend(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Have the heuristics choose as they would on a GPU."""
    for module in modules_that_ask():
        monkeypatch.setattr(module, "device_of", lambda device: Device(architecture, 4))


class Tried:
    """Stands for the tuner: takes the candidates of each launch in turn, and remembers which there are."""

    def __init__(self) -> None:
        self.turn = 0
        self.most = 1

    def choose(self, kernel, choice: Choice, run, device) -> Config:
        self.most = max(self.most, len(choice.candidates))
        return choice.candidates[min(self.turn, len(choice.candidates) - 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case}")
@pytest.mark.parametrize(("architecture", "dtype"), LISTS, ids=str)
def test_every_candidate(architecture, case: Case, dtype, monkeypatch):
    pretend(monkeypatch, architecture)
    tried = Tried()
    monkeypatch.setattr(env, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "choose", tried.choose)
    while tried.turn < tried.most:  # known after the first turn
        measured = measure(replace(case, dtype=dtype), "triton")
        assert all(each.passed for each in measured), "\n".join(map(str, measured))
        tried.turn += 1
