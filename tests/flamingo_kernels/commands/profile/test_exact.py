"""Models in float64, whole and a block at a time."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels import __main__ as cli
from flamingo_kernels.commands.profile import count, exact, models, run
from flamingo_kernels.commands.profile.subject import INFERENCE, QUICK
from flamingo_kernels.testing import tiny

NAMES = ["tiny", *tiny.names()]


def subject(name: str, dtype: torch.dtype = torch.bfloat16):
    try:
        return models.plan(name, QUICK).only(INFERENCE).subject(dtype, "cpu")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_by_block_is_whole(name):
    found = {}
    for by_block in (False, True):  # anew, as some keep what they computed
        made = subject(name)
        state = {key: value.clone() for key, value in made.model.state_dict().items()}
        with exact.in_float64(made.model, by_block=by_block):
            found[by_block] = {work: run._result(work, made.works[work], made.model) for work in made.works}
    for work, (expected,) in found[False].items():
        assert expected.dtype == torch.float64
        torch.testing.assert_close(found[True][work][0], expected, rtol=0, atol=0)
    for key, value in made.model.state_dict().items():
        assert value.dtype == state[key].dtype
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in exact.blocks_of(made.model))


def test_one_block_at_a_time_is_in_float64():
    made = subject("tiny")
    blocks, most = list(exact.blocks_of(made.model)), []
    assert len(blocks) > 6

    def wide(*_):
        most.append(sum(next(block.parameters()).dtype == torch.float64 for block in blocks))

    with exact.in_float64(made.model, by_block=True):
        for block in blocks:
            block.register_forward_pre_hook(wide)
        run._result("prefill", made.works["prefill"], made.model)
        assert {next(block.parameters()).dtype for block in blocks} == {torch.bfloat16}
        assert made.model.language.embedding.weight.dtype == torch.float64
    assert set(most) == {1}


def test_a_block_that_fails_is_as_it_was():
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3)])
    holder = torch.nn.Module()
    holder.layers = model
    with exact.in_float64(holder, by_block=True), pytest.raises(RuntimeError):
        model[0](torch.zeros(2, 4))
    assert model[0].weight.dtype == torch.float32


def test_what_it_takes():
    layers = torch.nn.ModuleList([torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 30, bias=False)])
    holder = torch.nn.Module()
    holder.layers, holder.head = layers, torch.nn.Linear(10, 5, bias=False)
    assert exact.bytes_needed(holder, by_block=False) == 2 * 8 * 450
    assert exact.bytes_needed(holder, by_block=True) == 4 * 450 + 8 * (50 + 300)


def little(plan, dtype, device, *, by_block=False):
    return "" if by_block else "needs more than there is"


def test_a_model_that_fits_by_block_is_run_without_a_training_step(monkeypatch, capsys):
    monkeypatch.setattr(count, "lacking_memory", little)
    assert cli.main(["profile", "tiny", "--quick", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "float64 of a block at a time, no training step" in shown
    assert "decode, patch" in shown
    assert "time by part, training step" not in shown


def test_its_training_step_alone_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(count, "lacking_memory", little)
    assert cli.main(["profile", "tiny", "--quick", "--only", "training step"]) == 0
    assert "Not run: it needs more than there is" in capsys.readouterr().out
