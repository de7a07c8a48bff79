"""quantize and unquantize: what becomes integers, what stays, what comes back, and what notices changes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import UnsupportedError, fold, patch, quantize, unfold, unpatch, unquantize
from flamingo_kernels.ops.linear import int8
from flamingo_kernels.quantize.layer import QuantizedConv1D, QuantizedLinear
from flamingo_kernels.testing import open_gates, tiny
from tests.helpers import ROOT
from tests.helpers.families import FAMILIES, TEXT, cross_attention, media_width
from tests.helpers.same import assert_same

LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]])
SIZES = tiny.Sizes(batch=2, text=14, images=3, width=64, heads=4, layers=4, visual=32, latents=5)


def layer(out=24, width=40, bias=True, dtype=torch.float32) -> nn.Linear:
    return nn.Linear(width, out, bias, dtype=dtype)


def small() -> Flamingo:
    return open_gates(Flamingo(FlamingoConfig.preset("tiny"))).eval()


def block(family: str = "flamingo") -> nn.Module:
    return cross_attention(family).eval()


def run(module: nn.Module, seed: int = 0, family: str = "flamingo") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, TEXT, generator=generator)
    media = torch.randn(2, 2, 5, media_width(family), generator=generator)
    with torch.no_grad():
        return module(x, media, LOCATIONS)


def numbers(quantized: nn.Module) -> torch.Tensor:
    """What a layer's integers stand for."""
    kept = quantized.integers
    pair = (quantized.weight, quantized.weight_scale) if kept is None else (kept.weight, kept.scale)
    return int8.dequantize(*pair, torch.float32)


# one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_layer_multiplies_by_integers(rows, keep, dtype):
    plain = layer(dtype=dtype)
    x = torch.randn(2, rows, 40).to(dtype)
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    report = quantize(plain, keep=keep)
    found = plain(x)
    assert found.dtype == dtype
    assert 0 < (found.double() - exact).norm() / exact.norm() < 0.02
    (made,) = report.quantized.values()
    size = plain.weight.element_size() if keep else torch.finfo(dtype).bits // 8
    assert (made.bytes_before, made.bytes_after, made.kept) == (24 * 40 * size, 24 * 40 + 24 * 4, keep)


def test_it_multiplies_by_the_numbers_that_its_integers_stand_for():
    plain = layer()
    quantize(plain)
    x = torch.randn(3, 40)
    right = F.linear(x.double(), numbers(plain).double(), plain.bias.double())
    torch.testing.assert_close(plain(x).double(), right, atol=1e-3, rtol=0)
    assert not torch.equal(numbers(plain), plain.weight)


def test_the_error_is_the_largest_of_a_weight():
    plain = layer()
    weight = plain.weight.detach().clone()
    report = quantize(plain)
    worst = (weight - numbers(plain)).abs().max().item()
    assert report.error == pytest.approx(worst)
    assert 0 < worst <= weight.abs().max() / 254 * 1.001


@pytest.mark.parametrize("bias", [True, False])
def test_unquantize_restores_to_the_bit(bias):
    plain = layer(bias=bias)
    x, state, weight = torch.randn(3, 40), copy.deepcopy(plain.state_dict()), plain.weight
    before = plain(x)
    quantize(plain)
    assert type(plain) is QuantizedLinear
    assert isinstance(plain, nn.Linear)
    assert plain.weight is weight
    assert not weight.requires_grad
    assert_same(plain.state_dict(), state)
    unquantize(plain)
    assert type(plain) is nn.Linear
    assert plain.weight is weight
    assert weight.requires_grad
    assert torch.equal(plain(x), before)
    assert set(vars(plain)) == set(vars(layer()))


def test_a_weight_that_needed_no_gradient_needs_none_afterwards():
    plain = layer().requires_grad_(False)
    quantize(plain)
    unquantize(plain)
    assert not plain.weight.requires_grad


def test_the_block_of_a_with_restores():
    plain = layer()
    with quantize(plain) as report:
        assert type(plain) is QuantizedLinear
        assert list(report.quantized) == [""]
    assert type(plain) is nn.Linear


def test_freed_originals_do_not_come_back():
    model = nn.Sequential(layer(), layer(), layer())
    quantize(model[0])
    quantize(model[1], keep=False)
    with pytest.raises(RuntimeError, match=r"^unquantize: expected layers whose originals.*the first 1;"):
        unquantize(model)
    assert type(model[0]) is QuantizedLinear
    with pytest.raises(RuntimeError, match="expected keep=True"), quantize(model, keep=False):
        pass


def test_freed_weights_are_integers_in_the_state():
    plain = layer()
    quantize(plain, keep=False)
    state = plain.state_dict()
    assert {name: each.dtype for name, each in state.items()} == {
        "weight": torch.int8, "bias": torch.float32, "weight_scale": torch.float32
    }  # fmt: skip
    assert sum(each.numel() * each.element_size() for each in state.values()) == 24 * 40 + 2 * 24 * 4
    assert [name for name, _ in plain.named_parameters()] == ["bias"]  # whose dtype is the model's


# what notices changes


def _assign(plain: nn.Linear) -> None:
    plain.weight.data = torch.randn(24, 40)


def _in_place(plain: nn.Linear) -> None:
    with torch.no_grad():
        plain.weight.mul_(2)


def _through_data(plain: nn.Linear) -> None:
    plain.weight.data.mul_(2)


def _through_numpy(plain: nn.Linear) -> None:
    plain.weight.detach().numpy()[:] *= 2


def _other_parameter(plain: nn.Linear) -> None:
    plain.weight = nn.Parameter(torch.randn(24, 40), requires_grad=False)


def _load(plain: nn.Linear) -> None:
    plain.load_state_dict(layer().state_dict())


def _other_dtype(plain: nn.Linear) -> None:
    plain.bfloat16().float()


CHANGES = [_assign, _in_place, _through_data, _through_numpy, _other_parameter, _load, _other_dtype]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_original_gives_new_integers(change, mode):
    plain, x = layer(), torch.randn(3, 40)
    quantize(plain)
    with mode():
        before = plain(x)
    change(plain)
    fresh = layer()
    fresh.load_state_dict(plain.state_dict())
    quantize(fresh)
    with mode():
        found = plain(x)
        assert not torch.equal(found, before)
        assert torch.equal(found, fresh(x))


def test_what_has_not_changed_is_kept(monkeypatch):
    plain, x = layer(), torch.randn(3, 40)
    quantize(plain)
    plain(x)
    monkeypatch.setattr(int8, "quantize_weight", None)
    plain(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("keep", [True, False])
def test_copies_are_quantized_and_alone(keep, copied):
    plain, x = layer(), torch.randn(3, 40)
    quantize(plain, keep=keep)
    expected = plain(x)
    twin = copied(plain)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(plain(x), expected)
    assert torch.equal(twin(x), twin.bias.expand(3, -1))
    if keep:
        unquantize(twin)
        assert type(twin) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_keep_their_bits_in_another_dtype(dtype):
    plain = layer()
    quantize(plain, keep=False)
    scale = plain.weight_scale.clone()
    plain.to(dtype)
    assert torch.equal(plain.weight_scale, scale)
    assert plain.weight.dtype == torch.int8
    if dtype != torch.float64:
        assert plain(torch.randn(3, 40, dtype=dtype)).dtype == dtype


def test_states_of_the_other_kind_are_refused():
    kept, freed, state = layer(), layer(), layer().state_dict()
    quantize(kept)
    quantize(freed, keep=False)
    integers = copy.deepcopy(freed.state_dict())
    with pytest.raises(RuntimeError, match=r"weight: expected torch.int8, got torch.float32"):
        freed.load_state_dict(state)
    assert_same(freed.state_dict(), integers)
    with pytest.raises(RuntimeError, match=r"weight: expected torch.float32, got torch.int8"):
        kept.load_state_dict(integers)
    with pytest.raises(RuntimeError, match="weight_scale"):
        layer().load_state_dict(integers)


def test_a_float_weight_in_the_place_of_integers_is_refused():
    plain = layer()
    quantize(plain, keep=False)
    plain.weight = nn.Parameter(torch.randn(24, 40), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"expected a weight of torch.int8.*got torch.float32"):
        plain(torch.randn(3, 40))


def test_a_weight_that_is_to_learn_is_refused():
    plain = layer()
    quantize(plain)
    plain.requires_grad_()
    with pytest.raises(RuntimeError, match="needs no gradient"):
        plain(torch.randn(3, 40))
    with torch.no_grad():
        plain(torch.randn(3, 40))


# models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patched", ["before", "after", "not"])
def test_a_block_computes_nearly_the_same(patched, family):
    module = block(family)
    before = run(module, family=family)
    if patched == "before":
        patch(module)
    report = quantize(module)
    assert not report.skipped
    if patched == "after":
        patch(module)
    found = run(module, family=family)
    assert 0 < (found - before).norm() / before.norm() < 0.02
    unquantize(module)
    if patched != "not":
        unpatch(module)
    assert torch.equal(run(module, family=family), before)


def test_parts_of_a_model():
    paths = {
        (language, vision): set(quantize(small(), language=language, vision=vision).quantized)
        for language in (True, False)
        for vision in (True, False)
    }
    between, towers = paths[False, False], paths[True, True]
    assert between
    assert all(path.startswith(("resampler.", "cross_attn.")) for path in between)
    assert all(path.startswith(("language.", *"")) for path in paths[True, False] - between)
    assert all(path.startswith("vision.") for path in paths[False, True] - between)
    assert towers == paths[True, False] | paths[False, True]
    assert len(towers) > len(paths[True, False]) > len(between)


@pytest.mark.parametrize("name", tiny.names())
def test_models_of_other_libraries(name):
    original = tiny.build(name, SIZES)
    model = original.model.eval()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            output = model(**original.inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    before = logits()
    patch(model)
    report = quantize(model, vision=True)
    assert len(report.quantized) > 4
    found = logits()
    assert 0 < (found - before).norm() / before.norm() < 0.05, report
    unquantize(model)
    unpatch(model)
    assert torch.equal(logits(), before)


@pytest.mark.parametrize("keep", [True, False])
def test_keys_and_values_of_a_quantized_layer_are_kept(keep, monkeypatch):
    """For the tokens after the text that brought the media; not if the weight changes."""
    module = block()
    patch(module)
    quantize(module, keep=keep)
    called, forward = [], QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: called.append(self) or forward(self, x))
    media, x = torch.randn(1, 2, 5, media_width("flamingo")), torch.randn(1, 2, TEXT)
    with torch.no_grad():
        module(x, media, torch.tensor([[1, 1]]))
        for _ in range(3):
            module(x[:, :1], media, torch.tensor([[1, 1]]), use_cached_media=True)
        assert called.count(module.attn.to_kv) == 1
        module.attn.to_kv.weight.mul_(2)
        module(x[:, :1], media, torch.tensor([[1, 1]]), use_cached_media=True)
    assert called.count(module.attn.to_kv) == 2


def test_skip_leaves_layers_alone():
    model = nn.ModuleDict({"a": nn.Sequential(layer(), layer()), "b": layer(), "ab": layer()})
    report = quantize(model, skip=["a.1", "b"])
    assert list(report.quantized) == ["a.0", "ab"]
    assert set(report.skipped) == {"a.1", "b"}
    assert type(model["b"]) is nn.Linear


@pytest.mark.parametrize("name", ["c", "a.", "", "0.a"])
def test_a_name_that_fits_nothing_is_refused(name):
    model = nn.ModuleDict({"a": nn.Sequential(layer())})
    with pytest.raises(ValueError, match="expected skip to name linear layers"):
        quantize(model, skip=[name])
    assert type(model["a"][0]) is nn.Linear


def test_a_string_of_names_is_refused():
    with pytest.raises(TypeError, match=r"pass skip=\['lm_head'\]"):
        quantize(layer(), skip="lm_head")


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        quantize(3)


class Named(nn.Linear):
    pass


def test_what_is_no_plain_layer_stays():
    parametrized = nn.utils.parametrizations.weight_norm(layer())
    endless = layer()
    endless.weight.data[3, 3] = torch.inf
    own = layer()
    own.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "named": Named(4, 4),
            "weight_norm": parametrized,
            "endless": endless,
            "own": own,
            "wide": layer(dtype=torch.float64),
            "attention": nn.MultiheadAttention(8, 2),
            "good": layer(),
        }
    )
    report = quantize(model)
    assert list(report.quantized) == ["good"]
    assert set(report.skipped) == {"named", "weight_norm", "endless", "own", "wide", "attention.out_proj"}
    assert "not finite" in report.skipped["endless"]
    assert endless.weight.requires_grad
    with pytest.raises(UnsupportedError, match="found no linear layer"):
        quantize(model)


def test_a_shared_weight_is_kept():
    model = nn.ModuleDict({"embed": nn.Embedding(24, 40), "head": layer(bias=False)})
    model["head"].weight = model["embed"].weight
    report = quantize(model, keep=False)
    assert report.quantized["head"].kept
    assert model["head"].weight is model["embed"].weight
    assert model["embed"](torch.tensor([3])).dtype == torch.float32


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for keep in (True, False):
        for linears in (True, False):
            plain = pytorch_utils.Conv1D(24, 40)
            x = torch.randn(3, 40)
            before, weight = plain(x), plain.weight.detach().clone()
            model = nn.Sequential(plain)
            if linears:
                patch(model, linears=True)
            quantize(model, keep=keep)
            assert type(plain) is QuantizedConv1D
            assert 0 < (plain(x) - before).norm() / before.norm() < 0.02
            if keep:
                unquantize(model)
                unpatch(model)
                assert type(plain) is pytorch_utils.Conv1D
                assert torch.equal(plain.weight, weight)


def test_fold_then_quantize():
    module = block()
    patch(module)
    before = run(module)
    fold(module)
    quantize(module)
    assert 0 < (run(module) - before).norm() / before.norm() < 0.02
    unquantize(module)
    unfold(module)
    assert torch.equal(run(module), before)


def test_folded_originals_are_not_freed():
    module = block()
    patch(module)
    fold(module)
    report = quantize(module, keep=False)
    assert "fold keeps its original" in report.skipped["attn.to_q"]
    unfold(module)


def test_linears_stay_swapped():
    model = nn.Sequential(layer(), layer())
    patch(model, linears=True)
    swapped = type(model[0])
    quantize(model)
    with pytest.raises(RuntimeError, match="undo first what changed its class"):
        unpatch(model)
    unquantize(model)
    assert type(model[0]) is swapped
    unpatch(model)
    assert type(model[0]) is nn.Linear


def test_an_adapter_learns_on_top():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"a": layer(40), "b": layer(4)})
    quantize(model)
    adapted = peft.get_peft_model(
        nn.Sequential(model["a"], model["b"]), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(5, 40)
    adapted(x).square().sum().backward()
    grads = {name: each.grad for name, each in adapted.named_parameters() if each.requires_grad}
    assert any("lora_A" in name for name in grads)
    assert all(each is not None and each.abs().sum() > 0 for name, each in grads.items() if "lora" in name)
    assert model["a"].weight.grad is None


def test_the_report_as_text():
    model = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "head": layer()})
    report = quantize(model, skip=["head"])
    lines = str(report).splitlines()
    assert lines[0].startswith("quantize: 2 layers, 0.0 MiB of weights became 0.0 MiB, largest error ")
    assert lines[0].endswith("; 2 originals kept")
    assert lines[1].split()[:2] == ["layers.*", "2"]
    assert "1 skipped" in lines[2]


def test_generation_gives_the_same_tokens_in_a_fresh_process(tmp_path):
    """Saved as safetensors, and loaded by a process that knows only how the model was built."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = small()
    quantize(model, keep=False)
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors")
    ids, pixels = torch.randint(256, (1, 9)), torch.randn(1, 1, 1, 3, *[model.config.image_size] * 2)
    ids[0, 0] = model.config.media_token_id
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = model(ids, pixels).logits
    code = f"""
import torch
from safetensors.torch import load_file
from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import quantize
model = Flamingo(FlamingoConfig.preset("tiny")).eval()
quantize(model, keep=False)
model.load_state_dict(load_file({str(tmp_path / "m.safetensors")!r}))
given = torch.load({str(tmp_path / "inputs.pt")!r})
with torch.no_grad():
    torch.save(model(given["ids"], given["pixels"]).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    loaded = torch.load(tmp_path / "logits.pt")
    assert torch.equal(loaded.argmax(-1), expected.argmax(-1))
    # Not bit for bit: float32 products of another process may be summed in another order.
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-3)
