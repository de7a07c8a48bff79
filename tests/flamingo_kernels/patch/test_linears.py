"""`patch(model, linears=True)`: which layers get the fastest product, and that a model computes the same."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from flamingo_kernels import UnsupportedError, fold, patch, unpatch
from flamingo_kernels.ops.linear import config, products
from flamingo_kernels.patch import linears
from tests.flamingo_kernels.patch.test_modes import WORDS
from tests.helpers import modes, slow_unless

FEW = 16
# Where kernels, libraries and autograd meet: each is run for every model in the slow tests.
MODES = ("plain", "autocast bf16", "weights in bf16", "held features", "own hooks", "checkpoints")
USUAL = [
    *((name, "plain") for name in modes.MODELS),
    *zip(modes.MODELS, (*MODES[1:], *MODES[1:]), strict=False),
]


@pytest.fixture
def chosen(monkeypatch):
    """Every product by the kernel for few rows or oneDNN, of any weight; how often each was taken."""
    taken = {}

    def choose(way, dtype, rows):
        name = "cpu" if way == "forward" and rows <= FEW else "onednn"
        taken[way, name] = taken.get((way, name), 0) + 1
        return name

    monkeypatch.setattr(config, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(config, "choose", choose)
    return taken


def runs(name: str, mode: str) -> bool:
    return WORDS[name, mode] in ("quick", "slow")


@pytest.mark.parametrize(
    ("name", "mode"),
    slow_unless(
        [each for each in USUAL if runs(*each)],
        [(name, mode) for name in modes.MODELS for mode in MODES if runs(name, mode)],
    ),
)
def test_a_whole_model_computes_the_same(name, mode, chosen, monkeypatch):
    monkeypatch.setattr(modes, "patch", partial(patch, linears=True))
    modes.hold(name, (mode,))
    assert ("forward", "cpu") in chosen
    if mode != "autocast bf16":  # where layers of the model itself call torch
        assert ("dx", "onednn") in chosen


class Model(nn.Module):
    """A linear layer of every kind that there is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.tied = nn.Linear(24, 24, bias=False)
        self.again = self.tied
        self.normed = parametrizations.weight_norm(nn.Linear(24, 24))
        self.other = Subclass(24, 24)
        self.wrapped = nn.Linear(24, 24)
        self.wrapped.forward = lambda x: F.linear(x, self.wrapped.weight)
        self.counts = nn.Linear(24, 24)
        self.counts.weight = nn.Parameter(torch.zeros(24, 24, dtype=torch.int8), requires_grad=False)
        self.attention = nn.MultiheadAttention(24, 2)

    def forward(self, x):
        x = self.again(self.tied(self.first(x)))
        return self.wrapped(self.other(self.normed(x)))


class Subclass(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def test_what_is_swapped_and_what_is_not_and_why():
    model = Model()
    report = patch(model, linears=True)
    assert report.linears == {"first": nn.Linear, "tied": nn.Linear}
    assert report.skipped == {
        "normed": "ParametrizedLinear is a linear layer of another kind",
        "other": "Subclass is a linear layer of another kind",
        "wrapped": "Linear has a forward set on the instance",
        "counts": "its weight is in torch.int8",
        "attention.out_proj": "its attention multiplies by its weight itself",
    }
    assert "  linear layers  2  torch.nn.modules.linear.Linear" in str(report)
    assert type(model.again) is linears.Linear
    again = patch(model, linears=True)
    assert again.linears == {}
    assert again.skipped == report.skipped


def test_parameters_state_and_place_stay():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    before, state = list(model.parameters()), model.state_dict()
    patch(model, linears=True)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert [id(each) for each in model.parameters()] == [id(each) for each in before]
    assert isinstance(model[0], nn.Linear)
    assert repr(model[0]) == "Linear(in_features=5, out_features=7, bias=True)"


def test_unpatch_and_the_end_of_a_block_restore_every_class():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with patch(model, linears=True):
        assert {type(each) for each in model} == {linears.Linear}
    assert {type(each) for each in model} == {nn.Linear}
    patch(model, linears=True)
    unpatch(model)
    assert {type(each) for each in model} == {nn.Linear}


def test_a_copy_and_a_pickle_are_swapped_too():
    model = nn.Sequential(nn.Linear(5, 7))
    patch(model, linears=True)
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is linears.Linear
        assert torch.equal(other(x), model(x))
        unpatch(other)
        assert type(other[0]) is nn.Linear


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UnsupportedError, match="found no module to replace in Sequential"):
        patch(nn.Sequential(nn.ReLU()), linears=True)
    with pytest.raises(UnsupportedError, match="found no module to replace in Sequential"):
        patch(nn.Sequential(nn.Linear(2, 2)))


def test_hooks_see_their_calls(chosen):
    model, seen = nn.Sequential(nn.Linear(5, 7)), []
    model[0].register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape)))
    patch(model, linears=True)
    model(torch.randn(3, 5))
    assert seen == [((3, 5), (3, 7))]


def test_a_change_of_a_weight_is_seen_in_the_next_call(chosen):
    """No product keeps anything of a weight."""
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    patch(layer, linears=True)
    with torch.no_grad():
        for change in (
            lambda w: w.mul_(2),
            lambda w: w.data.copy_(torch.randn_like(w)),
            lambda w: w.detach().numpy().fill(3),
        ):
            layer(x)
            change(layer.weight)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_conv1d_of_transformers(rows, chosen):
    """Its weight is transposed, so few rows are torch's."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    layer, x = utils.Conv1D(24, 40), torch.randn(rows, 40, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    report = patch(layer, linears=True)
    assert report.linears == {"": utils.Conv1D}
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    unpatch(layer)
    assert type(layer) is utils.Conv1D


def test_a_low_rank_adapter_keeps_its_meaning(chosen):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 24)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(3, 24)
    expected = model(x)
    report = patch(model, linears=True)
    assert sorted(path.rpartition(".")[2] for path in report.linears) == ["base_layer", "default", "default"]
    torch.testing.assert_close(model(x), expected)


def test_sublayers_and_fold_take_swapped_layers_as_plain(chosen):
    """What asks for a plain linear layer gets one: a swapped layer computes the same."""
    model = modes.build("flamingo").model.eval()
    other = copy.deepcopy(model)
    patch(model)
    assert set(patch(other, linears=True).replaced) == {
        path for path, module in model.named_modules() if hasattr(module, "_unpatched_class")
    }
    assert {path: set(names) for path, names in fold(other).folded.items()} == {
        path: set(names) for path, names in fold(model).folded.items()
    }


def test_without_the_kernels_a_layer_is_torchs(monkeypatch):
    """Where nothing was measured, `F.linear` is called, and gives its own bits."""
    monkeypatch.setattr(config, "choose", lambda *_: "torch")
    layer, x = nn.Linear(1024, 1024), torch.randn(3, 1024, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    patch(layer, linears=True)
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("weights", [24 * 24, 24 * 24 + 1])
def test_a_table_that_is_none_is_refused_before_a_product_asks_for_it(weights, monkeypatch, tmp_path):
    """Where one will: a smaller weight asks for none."""
    (tmp_path / "linear.json").write_text("{")
    monkeypatch.setattr(config, "OWN", tmp_path / "linear.json")
    monkeypatch.setattr(config, "LEAST_WEIGHTS", weights)
    config.forget()
    model = nn.Sequential(nn.Linear(24, 24))
    if weights == 24 * 24:
        with pytest.raises(ValueError, match=r"^linear: expected JSON in .*linear\.json"):
            patch(model, linears=True)
    else:
        patch(model, linears=True)
    assert (type(model[0]) is nn.Linear) == (weights == 24 * 24)


def test_a_small_weight_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "by_kernel", None)
    layer = nn.Linear(8, 8)
    patch(layer, linears=True)
    assert layer(torch.ones(2, 8)).shape == (2, 8)
