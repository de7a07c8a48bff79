"""Which modules are swapped and how that is known: copies, what the caller says, and what is said aloud."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import flamingo_kernels as fk
from flamingo import modules
from flamingo_kernels import patch, unpatch
from flamingo_kernels.layers import Fused
from flamingo_kernels.patch import open_flamingo as fused
from tests.helpers import third_party
from tests.helpers.lookalikes import SIZES, VISUAL, Gated, LooksAtMedia, Reads, Sums, inputs, make
from tests.helpers.variants import edited, load
from tests.helpers.weights import randomise

TEXT = {**SIZES, "dim_visual": VISUAL}


def vendored(library, folder, monkeypatch, *edits, name="robot_tokens"):
    """A library's file in a package of somebody else."""
    path = folder / f"{name}.py"
    path.write_text(edited(Path(library.__file__).read_text(), *edits))
    return load(path, name, monkeypatch)


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """A copy of open_flamingo's helpers."""
    return vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch)


def block_inputs():
    torch.manual_seed(3)
    places = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()
    return torch.randn(2, 7, 16), torch.randn(2, 2, 4, VISUAL), places


def classes(model):
    return [type(module) for module in model.modules()]


class TestCopies:
    @pytest.mark.parametrize("name", ["robot.vision.tokens", "transformers_modules.3fa2c1.modeling_robot"])
    def test_at_any_place(self, name, tmp_path, monkeypatch):
        copied = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, name=name)
        block = randomise(copied.GatedCrossAttentionBlock(**TEXT))
        resampler = randomise(copied.PerceiverResampler(**SIZES, depth=2, num_latents=3, max_num_media=4))
        model = nn.ModuleDict({"block": block, "resampler": resampler})
        media = torch.randn(2, 3, 1, 5, 16)
        expected = block(*block_inputs()), resampler(media)
        before = classes(model)
        report = patch(model)
        assert report.notes == {
            "block": "a copy of open_flamingo.GatedCrossAttentionBlock",
            "block.attn": "a copy of open_flamingo.MaskedCrossAttention",
            "resampler": "a copy of open_flamingo.PerceiverResampler",
            "resampler.layers.0.0": "a copy of open_flamingo.PerceiverAttention",
            "resampler.layers.1.0": "a copy of open_flamingo.PerceiverAttention",
        }
        assert report.replaced.keys() == report.notes.keys()
        assert report.policies == ("open_flamingo",)
        torch.testing.assert_close((block(*block_inputs()), resampler(media)), expected)
        unpatch(model)
        assert classes(model) == before

    def test_under_any_class_name(self, tmp_path, monkeypatch):
        renamed = [("PerceiverResampler", "Summary"), ("MaskedCrossAttention", "Looker")]
        copied = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, *renamed)
        assert (
            patch(copied.Summary(**SIZES, depth=1)).notes[""] == "a copy of open_flamingo.PerceiverResampler"
        )
        assert patch(copied.Looker(**TEXT)).notes[""] == "a copy of open_flamingo.MaskedCrossAttention"

    def test_of_flamingo_pytorch(self, tmp_path, monkeypatch):
        copied = vendored(third_party.flamingo_pytorch(), tmp_path, monkeypatch)
        block = randomise(copied.GatedCrossAttentionBlock(**SIZES))
        x, _, places = block_inputs()
        media = torch.randn(2, 2, 4, 16)
        expected = block(x, media, places)
        report = patch(block)
        assert report.notes[""] == "a copy of flamingo_pytorch.GatedCrossAttentionBlock"
        torch.testing.assert_close(block(x, media, places), expected)

    def test_of_the_reference(self, tmp_path, monkeypatch):
        copied = vendored(modules, tmp_path, monkeypatch)
        block = randomise(copied.GatedCrossAttentionBlock(**TEXT))
        expected = block(*block_inputs())
        assert patch(block).notes[""] == "a copy of flamingo.GatedCrossAttentionBlock"
        torch.testing.assert_close(block(*block_inputs()), expected)

    def test_fixes_are_those_of_the_original(self, tokens):
        attn = randomise(tokens.MaskedCrossAttention(**TEXT))
        assert patch(attn, fixes=["uniform_rows"]).fixes == ("uniform_rows",)
        assert attn.policy == "zero"

    def test_two_copies_and_the_original(self, tokens, tmp_path, monkeypatch):
        other = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, name="other.tokens")
        original = third_party.open_flamingo("helpers")
        model = nn.ModuleList(
            randomise(home.MaskedCrossAttention(**TEXT)) for home in (tokens, other, original)
        )
        expected = [attn(*block_inputs()) for attn in model]
        before = classes(model)
        report = patch(model)
        assert list(report.notes) == ["0", "1"]
        assert list(report.replaced) == ["0", "1", "2"]
        torch.testing.assert_close([attn(*block_inputs()) for attn in model], expected)
        assert len({type(attn) for attn in model}) == 3
        unpatch(model)
        assert classes(model) == before

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_duplicates(self, tokens, duplicate):
        block = randomise(tokens.GatedCrossAttentionBlock(**TEXT))
        before = classes(block)
        expected = block(*block_inputs())
        patch(block)
        again = duplicate(block)
        assert classes(again) == classes(block) != before
        torch.testing.assert_close(again(*block_inputs()), expected)
        unpatch(again)
        assert classes(again) == before
        assert torch.equal(again(*block_inputs()), expected)

    def test_twice_is_once(self, tokens):
        block = tokens.GatedCrossAttentionBlock(**TEXT)
        patch(block)
        once = classes(block)
        assert patch(block).skipped == {"": "already fused", "attn": "already fused"}
        assert classes(block) == once

    def test_none_is_made(self, tokens, monkeypatch):
        """A copy is known by its source, without an instance of it."""
        attn = tokens.MaskedCrossAttention(**TEXT)
        monkeypatch.setattr(tokens.MaskedCrossAttention, "__init__", None)
        assert patch(attn).replaced

    def test_a_subclass(self, tokens):
        class Named(tokens.PerceiverAttention):
            def describe(self):
                return "as it was"

        attn = randomise(Named(**SIZES))
        assert patch(attn).notes[""] == "a copy of open_flamingo.PerceiverAttention"
        assert attn.describe() == "as it was"


class TestNoCopies:
    """A word of the source, or of what it calls, means something else: left alone, without a warning."""

    def left(self, module, *tensors):
        expected, before = module(*tensors), classes(module)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = patch(nn.ModuleList([module, modules.MaskedCrossAttention(**TEXT)]))
        assert list(report.replaced) == ["1"]
        assert classes(module) == before
        assert torch.equal(module(*tensors), expected)
        return report.skipped.get("0", "")

    @pytest.mark.parametrize(
        "edit",
        [
            ("sim - sim.amax", "sim - 0 * sim.amax"),
            ("return val is not None", "return val is not None and len(val)"),
            ("if exists(media_locations):", "if exists(media_locations) and not FLAG:"),
            ("import rearrange_many", "import rearrange_many as rearrange_any"),
        ],
        ids=["forward", "helper", "flag", "import"],
    )
    def test_other_source(self, edit, tmp_path, monkeypatch):
        edits = [edit, ("def exists", "FLAG = False\n\n\ndef exists")]
        if "rearrange_any" in edit[1]:
            edits.append(
                (
                    "def exists",
                    "def rearrange_many(*all, **h):\n    return rearrange_any(*all, **h)\n\n\ndef exists",
                )
            )
        copied = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, *edits)
        hint = self.left(randomise(copied.MaskedCrossAttention(**TEXT)), *block_inputs())
        assert hint == (
            "MaskedCrossAttention of robot_tokens is not a known one: it has the parts of "
            'open_flamingo.MaskedCrossAttention and another forward; like={"MaskedCrossAttention": '
            '"open_flamingo.MaskedCrossAttention"} has it tried'
        )

    @pytest.mark.parametrize("name", ["exists", "rearrange", "einsum", "torch", "repeat"])
    def test_replaced_later(self, name, tokens, monkeypatch):
        class Same:
            def __init__(self, value):
                self.value = value

            def __getattr__(self, name):
                return getattr(self.value, name)

            def __call__(self, *args, **options):
                return self.value(*args, **options)

        monkeypatch.setattr(tokens, name, Same(getattr(tokens, name)))
        assert self.left(randomise(tokens.MaskedCrossAttention(**TEXT)), *block_inputs())

    def test_another_module_of_its_package(self, tmp_path, monkeypatch):
        """What a copy imports from its own package is not part of the source that is known."""
        (tmp_path / "checks.py").write_text("def exists(value):\n    return value is not None\n")
        load(tmp_path / "checks.py", "robot.checks", monkeypatch)
        edit = ("def exists(val):\n    return val is not None", "from robot.checks import exists")
        copied = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, edit)
        assert self.left(randomise(copied.MaskedCrossAttention(**TEXT)), *block_inputs())

    def test_a_subclass_with_another_forward(self, tokens):
        class Doubled(tokens.PerceiverAttention):
            def forward(self, x, latents):
                return 2 * super().forward(x, latents)

        attn = randomise(Doubled(**SIZES))
        self.left(attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16))

    def test_a_subclass_with_another_call(self, tokens):
        class Doubled(tokens.PerceiverAttention):
            def __call__(self, *args):
                return 2 * super().__call__(*args)

        attn = randomise(Doubled(**SIZES))
        self.left(attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16))

    def test_a_subclass_with_another_helper(self, tmp_path, monkeypatch):
        copied = vendored(modules, tmp_path, monkeypatch)

        class Halved(copied.PerceiverAttention):
            def _keys_and_values(self, x):
                k, v = super()._keys_and_values(x)
                return k, v / 2

        attn = randomise(Halved(**SIZES))
        self.left(attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16))

    def test_a_forward_on_the_instance(self, tokens):
        attn = randomise(tokens.PerceiverAttention(**SIZES))
        attn.forward = lambda x, latents: latents
        reason = self.left(attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16))
        assert reason == "PerceiverAttention has a forward set on the instance"

    def test_another_part(self, tokens):
        attn = randomise(tokens.PerceiverAttention(**SIZES))
        attn.gate = nn.Linear(2, 2)
        assert "gate is not one of its parts" in self.left(
            attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16)
        )

    def test_a_wrapper_of_the_same_name(self, tokens):
        """In LLaVA-NeXT the class of this name holds the one of that kind."""

        class PerceiverResampler(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tokens.PerceiverResampler(**SIZES, depth=1, num_latents=3)

            def forward(self, x):
                return self.inner(x[:, None, None]).squeeze(1)

        module, x = randomise(PerceiverResampler()), torch.randn(2, 5, 16)
        expected = module(x)
        report = patch(module)
        assert list(report.replaced) == ["inner", "inner.layers.0.0"]
        assert "inner is not one of its parts" in report.skipped[""]
        torch.testing.assert_close(module(x), expected)

    def test_no_feed_forward_network(self, tmp_path, monkeypatch):
        """Then the residual doubles the latents."""
        edit = (
            "FeedForward(dim=dim, mult=ff_mult),",
            "FeedForward(dim=dim, mult=ff_mult) if ff_mult else nn.Identity(),",
        )
        copied = vendored(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, edit)
        resampler, x = (
            randomise(copied.PerceiverResampler(**SIZES, depth=2, ff_mult=0)),
            torch.randn(2, 3, 1, 5, 16),
        )
        expected = resampler(x)
        assert patch(resampler).replaced[""]
        torch.testing.assert_close(resampler(x), expected)


TARGET = "open_flamingo.MaskedCrossAttention"


class TestLike:
    @pytest.mark.parametrize("key", ["LooksAtMedia", "tests.helpers.lookalikes.LooksAtMedia", LooksAtMedia])
    def test_by_name_and_class(self, key):
        model = Gated(**TEXT)
        report = patch(model, like={key: TARGET})
        assert list(report.replaced) == ["attn"]
        assert report.notes["attn"].startswith(f"as {TARGET}, a trial of ")
        assert isinstance(model.attn, fused.MaskedCrossAttention)
        assert isinstance(model.attn, LooksAtMedia)

    def test_of_several(self):
        model = nn.ModuleList([make(Gated), make(Sums)])
        like = {
            Gated: "open_flamingo.GatedCrossAttentionBlock",
            LooksAtMedia: TARGET,
            Sums: "open_flamingo.PerceiverResampler",
            Reads: "open_flamingo.PerceiverAttention",
        }
        original = copy.deepcopy(model)
        report = patch(model, like=like)
        assert list(report.replaced) == ["0", "0.attn", "1", *(f"1.layers.{i}.0" for i in range(3))]
        for new, old in zip(model, original, strict=True):
            torch.testing.assert_close(new(*inputs(old)), old(*inputs(old)), rtol=1e-4, atol=1e-5)

    def test_one_trial_for_modules_alike(self):
        made = []

        class Counted(Reads):
            def __init__(self, **sizes):
                super().__init__(**sizes)
                made.append(self)

        model = nn.ModuleList(Counted(**SIZES) for _ in range(4))
        made.clear()
        assert len(patch(model, like={Counted: "open_flamingo.PerceiverAttention"}).replaced) == 4
        assert len(made) == 1

    def test_one_trial_for_each_setting(self):
        """A scale that is not read makes no difference while it is the usual one."""

        class OwnScale(Reads):
            def scores(self, q, k):
                return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5

        model = nn.ModuleList([OwnScale(**SIZES), OwnScale(**SIZES)])
        before = classes(model)
        model[1].scale *= 2
        with pytest.raises(fk.UnsupportedError, match="the result differs"):
            patch(model, like={OwnScale: "open_flamingo.PerceiverAttention"})
        assert classes(model) == before
        assert list(patch(model[0], like={OwnScale: "open_flamingo.PerceiverAttention"}).replaced) == [""]

    def test_by_a_function_that_builds(self):
        class Configured(Reads):
            def __init__(self, config):
                super().__init__(**config)

        attn = Configured(SIZES)
        target = "open_flamingo.PerceiverAttention"
        with pytest.raises(fk.UnsupportedError, match=r"no small one can be made for a trial \(TypeError: "):
            patch(attn, like={"Configured": target})
        small = {"dim": 12, "dim_head": 8, "heads": 3}
        report = patch(attn, like={"Configured": (target, lambda: Configured(small))})
        assert report.notes[""].startswith(f"as {target}, a trial of ")

    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (lambda: Sums(**SIZES), "the one made for a trial is a Sums"),
            (lambda: 1 / 0, r"no small one can be made for a trial \(ZeroDivisionError: "),
            (lambda: None, "no small one can be made for a trial"),
        ],
    )
    def test_by_a_function_that_builds_something_else(self, build, reason):
        attn = Reads(**SIZES)
        with pytest.raises(fk.UnsupportedError, match=reason):
            patch(attn, like={Reads: ("open_flamingo.PerceiverAttention", build)})
        assert type(attn) is Reads

    def test_by_a_function_that_gives_the_module_itself(self):
        attn = make(Reads)
        before = copy.deepcopy(attn.state_dict())
        with pytest.raises(fk.UnsupportedError, match="a new one shares weights with the others"):
            patch(attn, like={Reads: ("open_flamingo.PerceiverAttention", lambda: attn)})
        assert all(torch.equal(value, before[name]) for name, value in attn.state_dict().items())

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_duplicates_and_the_way_back(self, duplicate):
        attn = make(LooksAtMedia)
        expected = attn(*inputs(attn))
        patch(attn, like={LooksAtMedia: TARGET})
        again = duplicate(attn)
        assert type(again) is type(attn)
        torch.testing.assert_close(again(*inputs(again)), expected, rtol=1e-4, atol=1e-5)
        unpatch(again)
        assert type(again) is LooksAtMedia
        assert torch.equal(again(*inputs(again)), expected)
        assert isinstance(attn, Fused)

    def test_twice_is_once(self):
        attn = make(LooksAtMedia)
        patch(attn, like={LooksAtMedia: TARGET})
        once = type(attn)
        assert patch(attn, like={"LooksAtMedia": TARGET}).skipped == {"": "already fused"}
        assert type(attn) is once

    def test_a_context(self):
        attn = make(LooksAtMedia)
        with patch(attn, like={LooksAtMedia: TARGET}):
            assert isinstance(attn, Fused)
        assert type(attn) is LooksAtMedia

    def test_a_flag_of_a_part(self):
        """The class is as the caller says, but this module attends to all earlier images."""
        attn = make(LooksAtMedia, only_attend_immediate_media=False)
        original = copy.deepcopy(attn)
        patch(attn, like={LooksAtMedia: TARGET})
        torch.testing.assert_close(attn(*inputs(attn)), original(*inputs(attn)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("like", "error", "message"),
        [
            ([LooksAtMedia], TypeError, "expected like as a dict of classes, got list"),
            ({3: TARGET}, TypeError, r"expected like={class: known class} or .* got {3: "),
            ({"LooksAtMedia": 3}, TypeError, r"got {'LooksAtMedia': 3}"),
            ({"LooksAtMedia": [TARGET, LooksAtMedia]}, TypeError, r"got {'LooksAtMedia': \["),
            ({"LooksAtMedia": (TARGET, 3)}, TypeError, r"got {'LooksAtMedia': \('open_flamingo"),
            (
                {"LooksAtMedia": "MaskedCrossAttention"},
                ValueError,
                "to be one of flamingo.Masked.*got 'Masked",
            ),
            ({"LookAtMedia": TARGET}, ValueError, "of the modules in LooksAtMedia, got 'LookAtMedia', which"),
            ({Reads: TARGET}, ValueError, "got 'tests.helpers.lookalikes.Reads', which none of them has"),
            ({"LooksAtMedia": "flamingo.MaskedCrossAttention"}, fk.UnsupportedError, "norm_media is missing"),
            (
                {"LooksAtMedia": "open_flamingo.PerceiverAttention"},
                fk.UnsupportedError,
                "is not one of its parts",
            ),
        ],
    )
    def test_mistakes(self, like, error, message):
        attn = make(LooksAtMedia)
        with pytest.raises(error, match=message):
            patch(attn, like=like)
        assert type(attn) is LooksAtMedia

    def test_a_mistake_leaves_the_whole_model(self):
        model = nn.ModuleList([modules.MaskedCrossAttention(**TEXT), make(Reads)])
        before = classes(model)
        with pytest.raises(fk.UnsupportedError):
            patch(model, like={Reads: TARGET})
        with pytest.raises(ValueError, match="none of them has"):
            patch(model, like={"Read": TARGET})
        assert classes(model) == before


def at_a_known_place(cls, name="MaskedCrossAttention", home="open_flamingo.src.helpers"):
    """The class as another release of a library may have it."""
    return type(name, (cls,), {"__module__": home, "__qualname__": name})


class TestKnownPlaces:
    def test_a_release_that_computes_the_same(self):
        attn = make(at_a_known_place(LooksAtMedia))
        original = copy.deepcopy(attn)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = patch(attn)
        note = report.notes[""]
        assert note.startswith("its forward is not one that is known: hash ")
        assert "; a trial of " in note
        assert f"open_flamingo.src.helpers.MaskedCrossAttention ({note})" in str(report)
        torch.testing.assert_close(attn(*inputs(original)), original(*inputs(original)), rtol=1e-4, atol=1e-5)

    def test_a_release_that_does_not(self):
        class Louder(LooksAtMedia):
            def read(self, p, media):
                return 2 * super().read(p, media)

        louder = at_a_known_place(Louder)
        model = nn.ModuleList([make(louder), make(louder), make(Reads), modules.MaskedCrossAttention(**TEXT)])
        with pytest.warns(UserWarning, match="left modules") as caught:
            report = patch(model)
        (warning,) = caught
        text = str(warning.message)
        assert text.startswith(
            "patch: left modules of ModuleList as they are: 2 MaskedCrossAttention of "
            "open_flamingo.src.helpers ("
        )
        assert "known: open-flamingo " in text
        assert 'in the call "text before, at and after images" of a trial' in text
        assert "say patch(model, like={...}) what a class is" in text
        assert warning.filename == __file__
        assert list(report.replaced) == ["3"]
        assert list(report.skipped) == ["0", "1"]

    def test_the_installed_version_is_named(self, monkeypatch):
        from flamingo_kernels.patch import api

        monkeypatch.setattr(api, "version", lambda name: f"9.9 of {name}")
        attn = at_a_known_place(Gated, "GatedCrossAttentionBlock")(**TEXT)
        attn.more = nn.Linear(2, 2)
        with pytest.warns(UserWarning, match="installed: 9.9 of open-flamingo, known: open-flamingo "):
            assert "more is not one of its parts" in patch(attn).skipped[""]


class TestNamesakes:
    def test_of_other_parts(self):
        class PerceiverAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm1 = nn.LayerNorm(4)

        model = nn.ModuleList([PerceiverAttention(), modules.MaskedCrossAttention(**TEXT)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = patch(model)
        assert report.skipped["0"] == (
            f"PerceiverAttention of {__name__} is not a known one: unlike open_flamingo.PerceiverAttention, "
            "norm1 is not one of its parts"
        )

    def test_of_the_same_parts(self):
        PerceiverAttention = type("PerceiverAttention", (Reads,), {"__module__": "elsewhere"})
        with pytest.raises(fk.UnsupportedError) as raised:
            patch(PerceiverAttention(**SIZES))
        hint = 'like={"PerceiverAttention": "open_flamingo.PerceiverAttention"} has it tried'
        assert raised.value.reasons == {
            "": [
                "PerceiverAttention of elsewhere is not a known one: it has the parts of "
                f"open_flamingo.PerceiverAttention and another forward; {hint}"
            ]
        }
