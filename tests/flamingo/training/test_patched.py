"""Training with the kernels has the losses of the plain model, within the budget of the kernels."""

import pytest
import torch

from flamingo.training import read_log, train
from flamingo_kernels import patch
from flamingo_kernels.ops.linear import config as products
from flamingo_kernels.testing import RandomRounding, compare
from tests.helpers.kernels import has_kernels
from tests.helpers.tiny_run import config, model, processor

DRAWS = 4  # of one alone, chance would decide


def losses(run):
    return torch.tensor([update["loss"] for update in read_log(run)], dtype=torch.float64)


@pytest.fixture
def other_products(monkeypatch):
    """Linear layers multiply by another library than torch takes in float32, however small they are."""
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(products, "choose", lambda *_: "onednn")


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_patched_losses_are_those_of_the_plain_model(data, tmp_path, recompute, other_products):
    """By the error budget over the whole run, against a run in float64."""
    changes = {"steps": 4, "gradient_checkpointing": recompute}
    train(model().double(), processor(), config(data, tmp_path / "exact", **changes))
    train(model(), processor(), config(data, tmp_path / "plain", **changes))
    for draw in range(DRAWS):
        with RandomRounding(draw):
            train(model(), processor(), config(data, tmp_path / f"drawn-{draw}", **changes))
    patched = model()
    assert len(patch(patched, linears=True).replaced) == 7
    train(patched, processor(), config(data, tmp_path / "patched", **changes))
    assert has_kernels(patched)
    exact, plain, fused = (losses(tmp_path / name) for name in ("exact", "plain", "patched"))
    assert not torch.equal(plain, fused), "the kernels did not run"
    drawn = [losses(tmp_path / f"drawn-{draw}") for draw in range(DRAWS)]
    rounding = max((each - exact).abs().max().item() for each in (plain, *drawn))
    measured = compare("losses", fused.float(), exact, rounding)
    assert measured.passed, measured


def test_a_patched_run_goes_on_plain(data, tmp_path):
    """Checkpoints know nothing of the kernels."""
    fused = model()
    patch(fused)
    train(fused, processor(), config(data, tmp_path, steps=2))
    train(model(seed=3), processor(), config(data, tmp_path, steps=4))
    assert len(read_log(tmp_path)) == 4
