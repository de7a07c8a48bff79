"""Hooks see the calls that the original makes, in its order and with its arguments, and count."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import MediaCache, layers, patch
from flamingo_kernels.testing import tiny
from tests.helpers.families import FAMILIES, TEXT, cross_attention, media_width, perceiver_attention
from tests.helpers.weights import randomise

SIZES = tiny.Sizes(batch=2, text=8, images=2, width=16, heads=2, layers=2, visual=8, latents=3)
NEEDS = {"open_flamingo-tiny": "einops_exts", "flamingo_pytorch-tiny": "einops_exts"}
models = pytest.mark.parametrize("name", [*tiny.names(), "flamingo"])
KINDS = {
    "forward": torch_module.register_module_forward_hook,
    "before forward": torch_module.register_module_forward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
    "before backward": torch_module.register_module_full_backward_pre_hook,
}


def build(name):
    if name == "flamingo":
        model = randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2)
        tokens = torch.tensor([[65, 256, 66, 67, 256, 68], [256, 65, 66, 67, 68, 69]])
        inputs = {"input_ids": tokens, "pixels": torch.randn(2, 2, 1, 3, 32, 32)}
        return tiny.TinyModel(name, model, inputs)
    pytest.importorskip(NEEDS.get(name, "transformers"))
    return tiny.build(name, SIZES)


def patched(original):
    model = copy.deepcopy(original.model)
    assert patch(model).replaced
    return tiny.TinyModel(original.name, model, original.inputs)


def shapes(values):
    if isinstance(values, dict):
        return {name: shapes(value) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return [shapes(value) for value in values]
    return tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__


def step(model):
    """The logits, and the gradients of all parameters."""
    model.model.zero_grad()
    loss = model.loss()
    loss.backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_steps_agree(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)


def change(kind):
    """A hook on all modules that doubles what every linear layer takes or gives."""

    def double(module, *values):
        if not isinstance(module, nn.Linear):
            return None
        value = values[0] if kind == "backward" else values[-1]
        if isinstance(value, tuple):
            return tuple(each if each is None or each.dtype == torch.bool else 2 * each for each in value)
        return 2 * value

    return double


class TestHooksOfAllModules:
    @pytest.mark.filterwarnings(
        "ignore:For backward hooks to be called, module output", "ignore:Full backward hook"
    )
    @models
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_they_change_counts(self, name, kind):
        original = build(name)
        fused = patched(original)
        before = step(original)
        handle = KINDS[kind](change(kind))
        try:
            ours, theirs = step(fused), step(original)
        finally:
            handle.remove()
        assert_steps_agree(ours, theirs)
        assert any(not torch.allclose(before[1][name], theirs[1][name]) for name in before[1])
        assert_steps_agree(step(fused), before)

    @models
    def test_they_see_the_same_calls(self, name):
        original = build(name)
        fused = patched(original)
        seen = []
        for model in (original, fused):
            paths = {module: path for path, module in model.model.named_modules()}
            calls = []

            def note(module, arguments, output, paths=paths, calls=calls):
                calls.append((paths.get(module), shapes(arguments), shapes(output)))

            handle = torch_module.register_module_forward_hook(note)
            try:
                model.logits()
            finally:
                handle.remove()
            seen.append([call for call in calls if call[0]])
        assert len(seen[0]) > 20
        assert seen[1] == seen[0]


def within(model):
    """The paths of all modules within one that is swapped, of the first of each class."""
    met = set()
    for path, module in model.named_modules():
        if isinstance(module, layers.Fused) and type(module) not in met:
            met.add(type(module))
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_modules() if name)


class TestHooksOfOneModule:
    @models
    @torch.no_grad()
    def test_of_every_part(self, name):
        original = build(name)
        fused = patched(original)
        paths = sorted(set(within(fused.model)))
        plain = original.logits()
        changed = 0
        for path in paths:
            seen = []
            for model in (original, fused):
                calls = []

                def note(module, arguments, given, output, calls=calls):
                    calls.append((shapes(arguments), shapes(given), shapes(output)))
                    if not isinstance(output, torch.Tensor):
                        return None
                    shift = torch.linspace(0.5, 1.5, output[0].numel()).view(output.shape[1:])
                    return output * shift  # differs from token to token

                part = model.model.get_submodule(path)
                handle = part.register_forward_hook(note, with_kwargs=True)
                seen.append((calls, model.logits()))
                handle.remove()
            (expected, theirs), (called, ours) = seen
            assert called == expected, path
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, p=path: f"{p}: {m}")
            changed += not torch.allclose(theirs, plain, atol=1e-3)
        assert changed > len(paths) / 3

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("path", ["attn", "attn.norm", "attn.to_kv", "attn.to_out", "ff", "ff.0", "ff.3"])
    @pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_of_backward(self, family, path, kind):
        block = cross_attention(family)
        fused = copy.deepcopy(block)
        patch(fused)
        tensors = torch.randn(2, 6, TEXT), torch.randn(2, 2, 5, media_width(family))
        locations = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
        gradients = []
        for module in (block, fused):
            double = change("backward" if kind == "register_full_backward_hook" else "before backward")
            part = module.get_submodule(path)
            getattr(part, kind)(lambda _, *values, double=double: double(nn.Linear(1, 1), *values))
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            module(*leaves, locations).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()])
        for ours, theirs in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-5)

    def test_bugs_that_are_fixed_stay_fixed(self):
        attn = cross_attention("open_flamingo", "MaskedCrossAttention")
        patch(attn, fixes=["uniform_rows"])
        x, media, places = torch.randn(1, 4, TEXT), torch.randn(1, 1, 5, 12), torch.tensor([[1, 0, 1, 0]])
        expected = attn(x, media, places)
        assert not expected[:, 2:].any()
        attn.to_out.register_forward_hook(lambda module, args, out: 2 * out)
        torch.testing.assert_close(attn(x, media, places), 2 * expected)

    @pytest.mark.parametrize(
        "path", [path for path, _ in cross_attention("open_flamingo").named_modules()][1:]
    )
    @torch.no_grad()
    def test_of_a_part_of_a_block_with_a_fix(self, path):
        """It calls its parts itself. Here all rows see an image, so there is nothing to fix."""
        original = cross_attention("open_flamingo")
        fused = copy.deepcopy(original)
        patch(fused, fixes=["uniform_rows"])
        x, media, places = torch.randn(2, 4, TEXT), torch.randn(2, 1, 5, 12), torch.tensor([[1, 0, 0, 0]] * 2)
        for module in (original, fused):
            module.get_submodule(path).register_forward_hook(lambda module, args, out: 2 * out)
        torch.testing.assert_close(fused(x, media, places), original(x, media, places), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES[:3])
    @pytest.mark.parametrize("how", ["watched", "put back", "attends otherwise"])
    @torch.no_grad()
    def test_a_text_and_a_token_after_it(self, family, how):
        original = cross_attention(family)
        fused = copy.deepcopy(original)
        patch(fused)
        if how == "watched":
            for module in (original, fused):
                module.attn.to_q.register_forward_hook(lambda module, args, out: 2 * out)
        elif how == "put back":
            fused.attn = original.attn
        elif family == "open_flamingo":
            pytest.skip("its attention is no method")
        else:
            for attn in (original.attn, fused.attn):
                attn.attend = lambda *args, attn=attn: 2 * type(attn).attend(attn, *args)
        media, places = torch.randn(2, 2, 5, 12), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
        for length, follows in ((4, ()), (1, (True,)), (3, (True,))):
            x = torch.randn(2, length, TEXT)
            ours, theirs = (module(x, media, places, *follows) for module in (fused, original))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES[:3])
    def test_kept_media_are_used(self, family):
        block = cross_attention(family)
        patch(block)
        x, media, places = torch.randn(2, 4, TEXT), torch.randn(2, 1, 5, 12), torch.tensor([[1, 0, 0, 0]] * 2)
        with torch.no_grad():
            cache, expected = MediaCache(block, media), block(x, media, places)
            block.attn.to_q.register_forward_hook(lambda *_: None)
            torch.testing.assert_close(block(x, cache, places), expected, rtol=1e-4, atol=1e-5)


class TestOtherWaysToChangeAPart:
    """What is not a hook, and changes what a part computes all the same."""

    def constrain(linear):
        class Rounded(nn.Module):
            def forward(self, weight):
                return weight.round(decimals=1)

        nn.utils.parametrize.register_parametrization(linear, "weight", Rounded())

    def count(linear):
        """A parametrization that is another each time it is asked."""

        class Grown(nn.Module):
            times = 0

            def forward(self, weight):
                self.times += 1
                return weight * self.times

        nn.utils.parametrize.register_parametrization(linear, "weight", Grown(), unsafe=True)

    def wrap(linear):
        linear._old_forward = linear.forward
        linear.forward = lambda *args, **kwargs: 2 * linear._old_forward(*args, **kwargs)

    def call(linear):
        class Doubled(nn.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        linear.__class__ = Doubled

    def call_impl(linear):
        linear._call_impl = lambda x: 2 * linear.forward(x)

    WAYS = {
        "given something else": lambda linear: linear.register_forward_pre_hook(
            lambda module, args: (2 * args[0],)
        ),
        "called otherwise": call,
        "called otherwise by itself": call_impl,
        "parametrized": constrain,
        "counted": count,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "weight_norm of old": nn.utils.weight_norm,
        "pruned": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5),
        "wrapped": wrap,
    }

    @pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("first", [True, False], ids=["patch first", "patch later"])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_of_linear_layers(self, family, change, first):
        modules = []
        for fuse in (False, True):
            torch.manual_seed(0)
            block, perceiver = cross_attention(family), perceiver_attention(family)
            both = nn.ModuleList([block, perceiver])
            if fuse and first:
                patch(both)
            for linear in [m for m in both.modules() if type(m) is nn.Linear]:
                change(linear)
            if fuse and not first:
                assert len(patch(both).replaced) == 3
            modules.append(both)
        x, media = torch.randn(2, 6, TEXT), torch.randn(2, 2, 5, media_width(family))
        features, latents = torch.randn(2, 2, 7, 12), torch.randn(2, 2, 3, 12)
        locations = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
        (theirs, their_latents), (ours, our_latents) = (
            (both[0](x, media, locations), both[1](features, latents)) for both in modules
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(our_latents, their_latents, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm, nn.GELU], ids=lambda cls: cls.__name__)
    def test_of_all_modules_of_a_class(self, cls, monkeypatch):
        block = cross_attention("open_flamingo")
        fused = copy.deepcopy(block)
        patch(fused)
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", functools.wraps(forward)(lambda self, x: 1.5 * forward(self, x)))
        tensors = torch.randn(2, 6, TEXT), torch.randn(2, 2, 5, 12), torch.tensor([[1, 0, 0, 1, 0, 0]] * 2)
        torch.testing.assert_close(fused(*tensors), block(*tensors), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("idefics", "IdeficsRMSNorm"),
            ("idefics", "IdeficsMLP"),
            ("idefics", "IdeficsAttention"),
            ("mllama", "MllamaTextRMSNorm"),
            ("mllama", "MllamaTextMLP"),
            ("evolla", "EvollaRMSNorm"),
            ("evolla", "EvollaFeedForward"),
        ],
    )
    @torch.no_grad()
    def test_of_all_modules_of_a_class_of_transformers(self, name, cls, monkeypatch):
        original = build(f"{name}-tiny")
        fused = patched(original)
        home = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        forward = getattr(home, cls).forward

        @functools.wraps(forward)
        def louder(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

        before = original.logits()
        monkeypatch.setattr(getattr(home, cls), "forward", louder)
        assert not torch.allclose(original.logits(), before, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(fused.logits(), original.logits(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["idefics-tiny", "mllama-tiny", "idefics2-tiny"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @torch.no_grad()
    def test_of_an_attention_function(self, name, implementation, monkeypatch):
        """Other functions may be registered under names that transformers has."""
        original = build(name)
        fused = patched(original)
        home = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        if implementation == "eager" and not hasattr(home, "get_interface"):
            pytest.skip("transformers 4 never looks up eager")
        sdpa = home["sdpa"]

        def louder(*args, **kwargs):
            return 1.5 * sdpa(*args, **kwargs)[0], None

        for model in (original.model, fused.model):
            model.set_attn_implementation(implementation)
        before = original.logits()
        torch.testing.assert_close(fused.logits(), before, rtol=1e-4, atol=1e-4)
        monkeypatch.setitem(home._global_mapping, implementation, louder)
        assert not torch.allclose(original.logits(), before, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(fused.logits(), original.logits(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("padded", [True, False])
    @torch.no_grad()
    def test_latents_that_see_in_order(self, padded):
        """Of Idefics2's attention the module says so, and no mask does."""
        original = build("idefics2-tiny")
        if not padded:
            del original.inputs["pixel_attention_mask"]
        fused = patched(original)
        for module in (*original.model.modules(), *fused.model.modules()):
            if hasattr(module, "is_causal") and "Perceiver" in type(module).__name__:
                module.is_causal = True
        torch.testing.assert_close(fused.logits(), original.logits(), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_an_activation_that_is_a_function(self):
        original = build("idefics-tiny")
        fused = patched(original)
        for model in (original.model, fused.model):
            for module in model.modules():
                if "act_fn" in module._modules:
                    del module.act_fn
                    module.act_fn = torch.sin
        torch.testing.assert_close(fused.logits(), original.logits(), rtol=1e-4, atol=1e-4)
