"""fold and unfold: the same outputs, nothing lost, and no training on the way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from flamingo import modules
from flamingo_kernels import UnsupportedError, fold, patch, unfold, unpatch
from flamingo_kernels.fold import Gate
from flamingo_kernels.layers.fused import gate_unless_open
from flamingo_kernels.testing import tiny
from tests.helpers.families import FAMILIES, TEXT, cross_attention, media_width
from tests.helpers.parity import DRAWS, hold

LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]])
SIZES = tiny.Sizes(batch=2, text=14, images=3, width=32, heads=4, layers=4, visual=16, latents=5)
CONFIGS = [
    ("idefics-tiny", {}),
    ("idefics-tiny", {"alpha_type": "vector"}),
    ("idefics-tiny", {"qk_layer_norms": True}),
    ("mllama-tiny", {}),
    ("evolla-tiny", {}),
]


def block(family: str = "flamingo", **sizes) -> nn.Module:
    """A patched block in inference, all of whose parameters are random."""
    fused = cross_attention(family, **sizes)
    patch(fused)
    return fused.eval()


def call(module: nn.Module, seed: int, family: str = "flamingo") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype if isinstance(module, nn.Module) else torch.float32
    x = torch.randn(2, 7, TEXT, generator=generator).to(torch.bfloat16).to(dtype)
    media = torch.randn(2, 2, 5, media_width(family), generator=generator).to(torch.bfloat16).to(dtype)
    with torch.no_grad():
        return module(x, media, LOCATIONS)


def assert_in_budget(original: nn.Module, folded: nn.Module, run) -> None:
    """By the error budget."""
    exact = run(copy.deepcopy(original).double())
    measured = hold("out", run(folded), lambda: run(original), exact)
    assert measured.passed, measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_block_computes_the_same(family, dtype):
    original = cross_attention(family).eval().to(dtype)
    fused = copy.deepcopy(original)
    patch(fused)
    report = fold(fused)
    assert not report.skipped
    assert set(report.folded) == {"", "attn"}
    draws = range(DRAWS)
    assert_in_budget(
        original, fused, lambda module: torch.stack([call(module, seed, family) for seed in draws])
    )


def test_weights_are_rounded_once():
    """Folded in float32, and then stored in what they were stored in."""
    half = block().to(torch.bfloat16)
    single = copy.deepcopy(half).float()
    for module in (half, single):
        patch(module)
        fold(module)
    for (name, weight), exact in zip(half.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(weight, exact.bfloat16()), name


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=str)
def test_a_folded_model_computes_the_same(name, config):
    original = tiny.build(name, SIZES, **config)
    model = original.model.eval()
    fused = copy.deepcopy(model)
    patch(fused)
    report = fold(fused)
    assert not report.skipped
    for path in report.folded:
        module = fused.get_submodule(path)
        gates = [each.gate for each in module.folds if isinstance(each, Gate)]
        assert len(gates) == 2
        assert all(gate_unless_open(module, gate) is None for gate in gates)

    def run(module):
        dtype = next(module.parameters()).dtype
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in original.inputs.items()}
        with torch.no_grad():
            return module(**inputs).logits

    assert_in_budget(model, fused, run)


def test_gates_norms_and_scales_are_gone():
    fused = block()
    weight, gate, scale = fused.attn.to_out.weight.clone(), fused.attn_gate.clone(), fused.attn.scale
    assert scale not in (0, 1)
    fold(fused)
    torch.testing.assert_close(fused.attn.to_out.weight.data, weight * gate.tanh())
    assert gate_unless_open(fused, "attn_gate") is None
    assert gate_unless_open(fused, "ff_gate") is None
    assert fused.attn.scale == 1
    assert (fused.attn.norm.weight == 1).all()
    assert (fused.ff[0].bias == 0).all()
    assert not any(p.requires_grad for p in (fused.attn.to_out.weight, fused.ff[1].bias, fused.attn_gate))


@pytest.mark.parametrize("hooked", [False, True])
def test_its_numbers_mean_the_same_to_everybody(hooked):
    """To who calls its parts one by one, and to the forward that was replaced."""
    fused = block()
    before = call(fused, 0)
    fold(fused)
    if hooked:
        fused.attn.to_q.register_forward_hook(lambda *args: None)
        fused.ff[1].register_forward_hook(lambda *args: None)
    forward = nn.Module.__call__ if hooked else modules.GatedCrossAttentionBlock.forward
    torch.testing.assert_close(call(lambda *args: forward(fused, *args), 0), before)


@pytest.mark.parametrize("scope", ["unfold", "with"])
def test_everything_comes_back(scope):
    fused = block()
    before = {name: (p, p.detach().clone()) for name, p in fused.named_parameters()}
    out = call(fused, 0)
    if scope == "with":
        with fold(fused):
            assert fused.attn.scale == 1
    else:
        fold(fused)
        unfold(fused)
    after = dict(fused.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
    assert torch.equal(call(fused, 0), out)
    fused.train()
    unpatch(fused)


def test_it_comes_back_where_the_model_is_now():
    fused = block()
    fold(fused)
    fused.to(torch.float64)
    unfold(fused)
    assert {p.dtype for p in fused.parameters()} == {torch.float64}
    assert fused.attn_gate.requires_grad


def test_state_dict_is_that_of_the_original():
    fused = block()
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    fold(fused)
    after = nn.ModuleDict({"block": fused}).state_dict()
    assert list(after) == [f"block.{name}" for name in before]
    for name, value in before.items():
        assert torch.equal(after[f"block.{name}"], value)


def test_copies_and_pickles_stay_folded():
    fused = block()
    before = call(fused, 0)
    fold(fused)
    folded = call(fused, 0)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(call(copied, 0), folded)
        unfold(copied)
        assert torch.equal(call(copied, 0), before)


def test_what_is_refused():
    fused = block()
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        fold("model")
    with pytest.raises(ValueError, match=r"got one in training mode; call model.eval\(\)"):
        fold(fused.train())
    with pytest.raises(UnsupportedError, match=r"nothing to fold in Linear; patch\(model\) first"):
        fold(nn.Linear(2, 2).eval())
    model = nn.Sequential(fused).eval()
    fold(model)
    with pytest.raises(RuntimeError, match="folded for inference; unfold"):
        model.train()
    model.eval()
    with pytest.raises(RuntimeError, match=r"unfold\(model\) before loading"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="unpatch: expected a model that is not folded"):
        unpatch(model)
    other = block()
    with pytest.raises(RuntimeError, match="unpatch: expected a model that is not folded"):
        unpatch(nn.Sequential(other, fused))
    assert type(other) is type(fused) is not modules.GatedCrossAttentionBlock
    with pytest.raises(UnsupportedError, match="nothing to fold") as error:
        fold(model)
    assert error.value.reasons == {"0": ["folded already"], "0.attn": ["folded already"]}


def hooked(fused):
    fused.attn.to_out.register_forward_hook(lambda *args: None)


def another_norm(fused):
    fused.ff[0] = nn.GroupNorm(1, 7).eval()


def shared(fused):
    fused.other = nn.Linear(1, 1)
    fused.other.weight = fused.ff[3].weight


def wide_gate(fused):
    fused.to(torch.bfloat16).ff_gate.data = fused.ff_gate.data.float()


@pytest.mark.parametrize(
    ("change", "path", "why"),
    [
        (hooked, "attn.to_out", "Linear is not a plain linear layer"),
        (another_norm, "ff.0", "GroupNorm is not a plain norm"),
        (shared, "ff.3.weight", "the parameter is shared"),
        (wide_gate, "ff_gate", "a gate in torch.float32 may widen what it is added to"),
    ],
)
def test_what_is_skipped(change, path, why):
    fused = block()
    change(fused)
    before = call(fused, 0)
    report = fold(fused)
    assert report.skipped == {path: why}
    assert f"1 skipped\n  {path.replace('.0', '.*').replace('.3', '.*')}  1  {why}" in str(report)
    tolerance = {"rtol": 0.02, "atol": 0.05} if fused.ff[1].weight.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(call(fused, 0), before, **tolerance)


def test_a_module_that_two_paths_reach_is_one():
    """open_flamingo registers each block with its layer, and once more in a list."""
    model = nn.ModuleDict({"layer": nn.ModuleDict({"block": block()})})
    model["blocks"] = nn.ModuleList([model["layer"]["block"]])
    before, state = call(model["blocks"][0], 0), model.state_dict()
    report = fold(model.eval())
    assert not report.skipped
    assert list(report.folded) == ["layer.block", "layer.block.attn"]
    torch.testing.assert_close(call(model["blocks"][0], 0), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    unfold(model)
    assert torch.equal(call(model["blocks"][0], 0), before)


def test_a_layer_in_two_blocks_stays():
    """Each would fold its own gate into it."""
    fused = block()
    fused.other = block()
    fused.other.ff[3] = fused.ff[3]
    before = [call(each, 0) for each in (fused, fused.other)]
    why = "the parameter is shared"
    assert fold(fused).skipped == {"ff.3.weight": why, "other.ff.3.weight": why}
    torch.testing.assert_close([call(each, 0) for each in (fused, fused.other)], before)


def test_a_norm_without_a_bias_gives_none():
    fused = block("flamingo")
    for norm in (fused.ff[0], fused.attn.norm):
        norm.bias.data.zero_()
    fold(fused)
    assert fused.ff[1].bias is None
    assert fused.attn.to_q.bias is None
