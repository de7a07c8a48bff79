"""The swap itself: what changes, what stays, what is refused, and the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import flamingo_kernels as fk
from flamingo import Flamingo, FlamingoConfig, modules
from flamingo_kernels import PatchReport, layers, patch, unpatch
from flamingo_kernels.patch.registry import families as families_of_patch
from tests.helpers.families import (
    FAMILIES,
    TEXT,
    cross_attention,
    media_width,
    perceiver_attention,
    resampler,
)
from tests.helpers.weights import randomise

LOCATIONS = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
families = pytest.mark.parametrize("family", FAMILIES)


def inputs(family="flamingo"):
    return torch.randn(2, 6, TEXT), torch.randn(2, 2, 5, media_width(family)), LOCATIONS


def types(model):
    return [type(module) for module in model.modules()]


def make(family, kind):
    return perceiver_attention(family) if kind == "PerceiverAttention" else cross_attention(family, kind)


class TestSwap:
    @families
    @pytest.mark.parametrize(
        "kind", ["MaskedCrossAttention", "GatedCrossAttentionBlock", "PerceiverAttention"]
    )
    def test_changes_the_class_and_nothing_else(self, family, kind):
        module = make(family, kind)
        before = copy.copy(vars(module))
        old, state = type(module), module.state_dict()
        parameters = list(module.parameters())
        report = patch(module)
        new = type(module)
        assert report.replaced[""] == (old, new)
        assert issubclass(new, old)
        assert issubclass(new, layers.Fused)
        assert new.__name__ == kind
        assert new.__module__.startswith("flamingo_kernels.")
        assert all(vars(module)[name] is value for name, value in before.items())
        assert list(module.state_dict()) == list(state)
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))

    @pytest.mark.parametrize("training", [True, False])
    def test_modes_and_frozen_parts_stay(self, training):
        block = cross_attention("open_flamingo").train(training)
        block.ff.train(not training)
        block.attn.requires_grad_(training)
        before = [
            (module.training, *(p.requires_grad for p in module.parameters())) for module in block.modules()
        ]
        for change in (patch, unpatch):
            change(block)
            assert before == [
                (module.training, *(p.requires_grad for p in module.parameters()))
                for module in block.modules()
            ]

    @families
    def test_unpatch_restores_classes_and_every_bit(self, family):
        block = cross_attention(family)
        before, tensors = types(block), inputs(family)
        names = set(vars(block))
        expected = block(*tensors)
        patch(block)
        assert types(block) != before
        unpatch(block)
        assert types(block) == before
        assert set(vars(block)) == names
        assert torch.equal(block(*tensors), expected)

    @families
    def test_twice_is_once(self, family):
        block = cross_attention(family)
        patch(block)
        once = types(block)
        again = patch(block)
        assert types(block) == once
        assert not again.replaced
        assert again.skipped == {"": "already fused", "attn": "already fused"}
        unpatch(block)
        assert type(block).__module__ not in (layers.__name__, type(once[0]).__module__)
        assert not any(isinstance(module, layers.Fused) for module in block.modules())

    @families
    def test_one_class_for_all_modules_of_a_class(self, family):
        first, second = cross_attention(family), cross_attention(family)
        patch(first)
        patch(second)
        assert types(first) == types(second)

    @families
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_stay_patched_and_know_the_way_back(self, family, duplicate):
        block, tensors = cross_attention(family), inputs(family)
        original = types(block)
        patch(block)
        again = duplicate(block)
        assert types(again) == types(block)
        assert torch.equal(again(*tensors), block(*tensors))
        unpatch(again)
        assert types(again) == original
        assert types(block) != original

    def test_hooks_stay(self):
        block, calls = cross_attention("open_flamingo"), []
        block.register_forward_hook(lambda *_: calls.append("block"))
        block.attn.register_forward_pre_hook(lambda *_: calls.append("attn"))
        block.ff.register_forward_hook(lambda *_: calls.append("ff"))
        block.ff[1].register_forward_hook(lambda *_: calls.append("linear"))
        patch(block)
        block(*inputs())
        assert calls == ["attn", "linear", "ff", "block"]

    def test_training_goes_on_in_the_same_optimizer(self):
        x, media, locations = inputs()
        block, steps = cross_attention("flamingo").double(), []
        for module in (block, copy.deepcopy(block)):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
            for step in range(3):
                if step == 1 and module is block:
                    patch(module)
                optimizer.zero_grad()
                module(x.double(), media.double(), locations).square().mean().backward()
                optimizer.step()
            steps.append(list(module.parameters()))
        for ours, theirs in zip(*steps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    @families
    def test_checkpoints_load_both_ways(self, family):
        patched, plain, tensors = cross_attention(family), cross_attention(family), inputs(family)
        patch(patched)
        expected = patched(*tensors)
        plain.load_state_dict(patched.state_dict())
        torch.testing.assert_close(plain(*tensors), expected)
        randomise(plain)
        patched.load_state_dict(plain.state_dict())
        torch.testing.assert_close(plain(*tensors), patched(*tensors))

    def test_layers_built_fused_stay_fused(self):
        block = layers.GatedCrossAttentionBlock(dim=TEXT, dim_visual=12)
        assert not patch(block).replaced
        unpatch(block)
        assert type(block) is layers.GatedCrossAttentionBlock

    def test_other_models_are_not_touched(self):
        block, other = cross_attention("flamingo"), cross_attention("flamingo")
        patch(block)
        assert type(other) is modules.GatedCrossAttentionBlock
        assert type(cross_attention("flamingo")) is modules.GatedCrossAttentionBlock


class TestContext:
    def test_ends_with_the_block(self):
        block = cross_attention("flamingo")
        original = types(block)
        with patch(block) as report:
            assert isinstance(report, PatchReport)
            assert types(block) != original
        assert types(block) == original

    def test_ends_with_an_exception(self):
        block = cross_attention("flamingo")
        with pytest.raises(KeyError, match="mine"), patch(block):
            raise KeyError("mine")
        assert type(block) is modules.GatedCrossAttentionBlock

    def test_gives_back_only_what_it_took(self):
        block = cross_attention("flamingo")
        patch(block.attn)
        with patch(block) as report:
            assert list(report.replaced) == [""]
        assert type(block) is modules.GatedCrossAttentionBlock
        assert type(block.attn) is layers.MaskedCrossAttention

    def test_unpatched_inside(self):
        block = cross_attention("flamingo")
        with patch(block):
            unpatch(block)
        assert type(block) is modules.GatedCrossAttentionBlock


class TestFixes:
    @pytest.mark.parametrize("family", FAMILIES[2:])
    def test_uniform_rows(self, family):
        block = cross_attention(family, "MaskedCrossAttention")
        x, media, _ = inputs(family)
        three = torch.tensor([[1, 0, 1, 0, 1, 0]] * 2).bool()  # and two images
        expected = block(x, media, media_locations=three)
        report = patch(block)
        assert not report.fixes
        kept = block(x, media, media_locations=three)
        torch.testing.assert_close(kept, expected)
        assert kept[:, 4:].any()
        unpatch(block)
        report = patch(block, fixes=["uniform_rows"])
        assert (report.fixes, report.policies) == (("uniform_rows",), ("zero",))
        assert str(report).startswith('patch: 1 module replaced, mask policy "zero", fixed: uniform_rows')
        fixed = block(x, media, media_locations=three)
        assert not fixed[:, 4:].any()
        torch.testing.assert_close(fixed[:, :4], expected[:, :4])
        assert torch.equal(copy.deepcopy(block)(x, media, media_locations=three), fixed)
        unpatch(block)
        assert torch.equal(block(x, media, media_locations=three), expected)
        report = patch(block)
        assert (report.fixes, report.policies) == ((), ("open_flamingo",))
        assert torch.equal(block(x, media, media_locations=three), kept)

    def test_a_fix_of_another_library_is_refused(self):
        block = cross_attention("open_flamingo")
        with pytest.raises(ValueError, match="'row_leak', which is of transformers Mllama"):
            patch(block, fixes=["uniform_rows", "row_leak"])
        assert type(block).__module__ == "open_flamingo.src.helpers"

    def test_a_fix_of_what_is_left_alone_is_refused(self):
        block = nn.ModuleList([cross_attention("flamingo"), cross_attention("open_flamingo")])
        for module in block[1].modules():
            module.surprise = torch.ones(1)
        with pytest.raises(ValueError, match="'uniform_rows', which is of open_flamingo, "):
            patch(block, fixes=["uniform_rows"])
        assert type(block[0]) is modules.GatedCrossAttentionBlock

    def test_a_fix_that_comes_too_late_is_refused(self):
        model = nn.ModuleList([cross_attention("open_flamingo"), cross_attention("open_flamingo")])
        patch(model[1].attn)
        with pytest.raises(
            ValueError, match=r"fix 'uniform_rows' comes too late for 1\.attn, .* unpatch\(model\)"
        ):
            patch(model, fixes=["uniform_rows"])
        assert type(model[0]).__module__ == "open_flamingo.src.helpers"
        unpatch(model)
        assert patch(model, fixes=["uniform_rows"]).policies == ("zero",)
        assert not patch(model, fixes=["uniform_rows"]).replaced
        assert not patch(model).replaced
        assert patch(model).policies == ("zero",)

    @pytest.mark.parametrize("fixes", ["uniform_rows", ""])
    def test_a_string_is_not_a_list(self, fixes):
        block = cross_attention("open_flamingo")
        with pytest.raises(
            TypeError, match=rf"fixes as a list of names, got '{fixes}'; pass fixes=\['{fixes}'\]"
        ):
            patch(block, fixes=fixes)
        assert type(block).__module__ == "open_flamingo.src.helpers"

    def test_an_unknown_fix(self):
        block = cross_attention("flamingo")
        with pytest.raises(ValueError, match="fix 'everything' is not one of causal, row_leak, uniform_rows"):
            patch(block, fixes=["everything"])
        assert type(block) is modules.GatedCrossAttentionBlock

    def test_the_documentation_names_all(self):
        known = {fix for family in families_of_patch() for fix in family.fixes}
        assert all(f"\n    {fix} " in patch.__doc__ for fix in known)


class TestReport:
    def test_a_whole_model(self):
        model = Flamingo(FlamingoConfig.preset("tiny", policy="open_flamingo"))
        report = patch(model)
        attention = (modules.MaskedCrossAttention, layers.MaskedCrossAttention)
        assert report.replaced["cross_attn.2.attn"] == attention
        assert report.policies == ("open_flamingo",)
        assert str(report) == (
            'patch: 7 modules replaced, mask policy "open_flamingo"\n'
            "  resampler             1  flamingo.modules.PerceiverResampler\n"
            "  resampler.layers.*.*  2  flamingo.modules.PerceiverAttention\n"
            "  cross_attn.*          2  flamingo.modules.GatedCrossAttentionBlock\n"
            "  cross_attn.*.attn     2  flamingo.modules.MaskedCrossAttention"
        )

    def test_what_was_skipped(self):
        model = nn.ModuleList([cross_attention("flamingo"), resampler("flamingo")])
        model[0].attn.forward = lambda *args: args[0]
        assert str(patch(model)) == (
            "patch: 4 modules replaced\n"
            "  *             1  flamingo.modules.GatedCrossAttentionBlock\n"
            "  *             1  flamingo.modules.PerceiverResampler\n"
            "  *.layers.*.*  2  flamingo.modules.PerceiverAttention\n"
            "1 skipped\n"
            "  *.attn  1  MaskedCrossAttention has a forward set on the instance"
        )

    @pytest.mark.parametrize(
        ("family", "policy"),
        [(family, "zero" if family == "flamingo, zero" else "open_flamingo") for family in FAMILIES],
    )
    def test_policies(self, family, policy):
        block = cross_attention(family)
        assert patch(block).policies == (policy,)
        assert patch(block).policies == (policy,)
        assert patch(perceiver_attention(family)).policies == ()

    def test_fixes_are_named_where_they_belong(self):
        model = nn.ModuleList([cross_attention("flamingo"), cross_attention("open_flamingo")])
        patch(model, fixes=["uniform_rows"])
        assert not hasattr(model[0], "fixes") or not model[0].fixes
        assert model[1].attn.fixes == {"uniform_rows"}

    def test_keeps_no_model_alive(self):
        block = cross_attention("flamingo")
        report, alive = patch(block), weakref.ref(block)
        del block
        gc.collect()
        assert alive() is None
        with report:
            assert len(report.replaced) == 2

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            patch(cross_attention("flamingo")).skipped = {}


class Narrated(modules.GatedCrossAttentionBlock):
    """Adds to the class, and overrides nothing that is replaced."""

    def narrate(self):
        return "once upon a time"


class Doubled(modules.GatedCrossAttentionBlock):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Uniform(modules.MaskedCrossAttention):
    def attend(self, q, k, v, media_locations, use_cached_media):
        return v.mean((1, 2))[:, None].expand_as(q)


class Namer(modules.GatedCrossAttentionBlock):
    """Has a method that by chance is named like one of the fused class's base."""

    def original_takes(self):
        return "everything"


class GatedCrossAttentionBlock(nn.Module):
    """A namesake."""

    def forward(self, x):
        return x


SIZES = {"dim": TEXT, "dim_visual": 12, "dim_head": 8, "heads": 3}


NAMESAKE = (
    f"GatedCrossAttentionBlock of {__name__} is not a known one: unlike "
    "open_flamingo.GatedCrossAttentionBlock, attn is missing"
)


class TestRecognition:
    def test_a_subclass_that_overrides_nothing(self):
        block, tensors = randomise(Narrated(**SIZES)), inputs()
        expected = block(*tensors)
        report = patch(block)
        assert report.replaced[""][0] is Narrated
        assert isinstance(block, Narrated)
        assert isinstance(block, layers.GatedCrossAttentionBlock)
        assert block.narrate() == "once upon a time"
        torch.testing.assert_close(block(*tensors), expected)
        again = pickle.loads(pickle.dumps(copy.deepcopy(block)))
        assert type(again) is type(block)
        assert torch.equal(again(*tensors), block(*tensors))
        unpatch(again)
        assert type(again) is Narrated

    @pytest.mark.parametrize(
        ("cls", "reason"),
        [
            (Doubled, "Doubled overrides forward of GatedCrossAttentionBlock"),
            (Uniform, "Uniform overrides attend of MaskedCrossAttention"),
            (Namer, "Namer overrides original_takes of GatedCrossAttentionBlock"),
        ],
    )
    def test_a_subclass_that_overrides(self, cls, reason):
        module = randomise(cls(**SIZES))
        tensors = inputs()
        expected = module(*tensors)
        assert patch(module).skipped == {"": reason}
        assert type(module) is cls
        torch.testing.assert_close(module(*tensors), expected)

    def test_a_known_class_that_was_changed_already(self, monkeypatch):
        block = cross_attention("flamingo_pytorch")
        monkeypatch.setattr(type(block), "forward", lambda self, x, media, media_locations=None: x)
        assert patch(block).skipped == {
            "": f"GatedCrossAttentionBlock was given another forward by {__name__}"
        }

    def test_a_namesake_beside_known_modules(self):
        model = nn.ModuleList([cross_attention("flamingo"), GatedCrossAttentionBlock()])
        assert patch(model).skipped == {"1": NAMESAKE}

    def test_nothing_known(self):
        model = nn.Sequential(nn.Linear(2, 2), GatedCrossAttentionBlock())
        with pytest.raises(fk.UnsupportedError) as raised:
            patch(model)
        message = str(raised.value)
        assert "found no module to replace in Sequential" in message
        assert "swapped by patch(model, like={" in message
        assert "linear layers by linears=True" in message
        assert f"{__name__}.GatedCrossAttentionBlock" in message
        for family in ("flamingo", "open_flamingo", "flamingo_pytorch"):
            assert (
                f"\n  {family}: MaskedCrossAttention, GatedCrossAttentionBlock, PerceiverAttention, "
                "PerceiverResampler of" in message
            )
        assert raised.value.reasons == {"1": [NAMESAKE]}
        unpatch(model)

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
            patch({})

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_torchscript(self):
        x, latents = torch.randn(1, 2, 7, 12), torch.randn(1, 2, 5, 12)
        attn = perceiver_attention("open_flamingo")
        traced = torch.jit.trace(attn, (x, latents), check_trace=False)
        reason = "PerceiverAttention is compiled to TorchScript; patch before torch.jit.script"
        assert patch(traced).skipped == {"": reason}


class TestWrappers:
    def test_a_compiled_model_runs_the_new_code(self):
        graphs = []

        def keep(graph, _):
            graphs.append(graph.print_readable(print_output=False))
            return graph

        torch._dynamo.reset()
        block, tensors = cross_attention("flamingo"), inputs()
        compiled = torch.compile(block, backend=keep)
        expected = compiled(*tensors)
        report = patch(compiled)
        assert list(report.replaced) == ["_orig_mod", "_orig_mod.attn"]
        torch.testing.assert_close(compiled(*tensors), expected)
        assert "einsum" in graphs[0]
        assert len(graphs) == 2
        unpatch(compiled)
        assert torch.equal(compiled(*tensors), expected)

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
    def test_fully_sharded_first(self, mesh):
        from torch.distributed.fsdp import fully_shard

        block, tensors = cross_attention("flamingo"), inputs()
        expected = block(*tensors)
        fully_shard(block, mesh=mesh)
        sharded = type(block)
        assert list(patch(block).replaced) == ["", "attn"]
        assert isinstance(block, sharded)
        torch.testing.assert_close(block(*tensors), expected)
        unpatch(block)
        assert type(block) is sharded

    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
    def test_fully_sharded_later(self, mesh):
        from torch.distributed.fsdp import fully_shard

        block, tensors = cross_attention("flamingo"), inputs()
        expected = block(*tensors)
        patch(block)
        fully_shard(block, mesh=mesh)
        torch.testing.assert_close(block(*tensors), expected)
        with pytest.raises(RuntimeError, match="got FSDPGatedCrossAttentionBlock; undo first"):
            unpatch(block)
        assert isinstance(block, layers.GatedCrossAttentionBlock)
        assert type(block.attn) is layers.MaskedCrossAttention


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
