"""AdamW as in the paper, and float32 weights behind a bfloat16 model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flamingo.training.optimizer import TrainedWeights, learning_rate, make_optimizer
from tests.helpers.tiny_run import config, model


def test_only_the_resampler_does_not_decay(tmp_path):
    """With a gradient of zero, decay is all that an update does."""
    weights = TrainedWeights(model(), bfloat16=False).by_name
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    make_optimizer(weights, config(tmp_path, tmp_path, learning_rate=0.5)).step()
    assert {name.partition(".")[0] for name in weights} == {"resampler", "cross_attn", "language"}
    for name, weight in weights.items():
        decayed = before[name] * (1 if name.startswith("resampler.") else 1 - 0.5 * 0.1)
        torch.testing.assert_close(weight, decayed, msg=name)


def test_no_decay_is_the_beginning_of_a_name(tmp_path):
    names = ["resampler.norm.weight", "language.resampler.weight", "cross_attn.0.ff.weight", "vision.bias"]
    weights = {name: nn.Parameter(torch.ones(1)) for name in names}
    run = config(tmp_path, tmp_path, no_decay=("resampler", "vision"), weight_decay=0.3)
    run = replace(run, betas=(0.8, 0.9), eps=1e-3)
    groups = make_optimizer(weights, run).param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert [decay[id(weight)] for weight in weights.values()] == [0, 0.3, 0.3, 0]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-3)}
    (group,) = make_optimizer(weights, replace(run, no_decay=())).param_groups
    assert len(group["params"]) == 4
    assert group["weight_decay"] == 0.3


def test_the_rate_grows_in_a_straight_line_and_stays(tmp_path):
    run = config(tmp_path, tmp_path, learning_rate=1e-4, warmup_steps=5000)
    assert learning_rate(1, run) == pytest.approx(2e-8)
    assert learning_rate(1000, run) == pytest.approx(2e-5)
    assert learning_rate(5000, run) == learning_rate(5001, run) == learning_rate(10**6, run) == 1e-4
    assert learning_rate(1, config(tmp_path, tmp_path, learning_rate=1e-4, warmup_steps=0)) == 1e-4


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="a model that is all frozen"):
        TrainedWeights(model().requires_grad_(False), bfloat16=False)


class TestBfloat16:
    def test_small_updates_are_not_lost(self):
        """A thousand updates of 1e-4 around 1, where bfloat16 has steps of 2 ** -8."""
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        weights = TrainedWeights(layer, bfloat16=True)
        optimizer = torch.optim.SGD(weights.by_name.values(), lr=1e-4)
        for _ in range(1000):
            layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            weights.publish()
        assert weights.by_name["weight"].item() == pytest.approx(0.9, abs=1e-4)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.item() == torch.tensor(0.9).bfloat16().item()

    def test_gradients_add_up_in_float32(self):
        layer = nn.Linear(1, 1, bias=False)
        weights = TrainedWeights(layer, bfloat16=True)
        for value in (256.0, 1.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
            layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
        assert weights.by_name["weight"].grad.item() == 259
        assert layer.weight.grad is None

    def test_frozen_parameters_are_stored_so_and_buffers_are_not(self):
        flamingo = model()
        flamingo.register_buffer("frequencies", torch.tensor([1.001]))
        weights = TrainedWeights(flamingo, bfloat16=True)
        assert {p.dtype for p in flamingo.parameters()} == {torch.bfloat16}
        assert {weight.dtype for weight in weights.by_name.values()} == {torch.float32}
        assert flamingo.frequencies.dtype == torch.float32

    def test_a_released_model_keeps_its_gradients(self):
        layer = nn.Linear(1, 1, bias=False)
        TrainedWeights(layer, bfloat16=True).release()
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad.item() == 1
