"""Only code that is known is swapped: what is installed is, and what differs by a word is left alone."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flamingo_kernels import patch
from flamingo_kernels.patch import __main__ as command
from flamingo_kernels.patch.known import KNOWN, installed
from flamingo_kernels.patch.registry import families
from tests.helpers import third_party
from tests.helpers.variants import edited, variant
from tests.helpers.weights import randomise

PLACES = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
SIZES = {"dim": 16, "dim_head": 8, "heads": 2}


def test_every_class_that_is_swapped_has_known_code():
    assert {f"{family.module}.{name}" for family in families() for name in family.fused} <= KNOWN.keys()


def test_what_is_installed_is_known():
    found = dict(installed())
    unknown = {name: code for name, code in found.items() if code not in KNOWN[name]}
    assert not unknown
    assert {name for name in KNOWN if name.startswith("flamingo.")} <= found.keys()
    for library in ("transformers", "flamingo_pytorch"):
        if importlib.util.find_spec(library):
            assert {name for name in KNOWN if name.startswith(f"{library}.")} <= found.keys()


def test_the_command_shows_it():
    asked = [sys.executable, "-m", "flamingo_kernels.patch"]
    done = subprocess.run(asked, env=os.environ, text=True, capture_output=True)
    assert "1513437f1a1ae75b  flamingo.modules.MaskedCrossAttention  this one" in done.stdout, done.stderr


def test_the_command_makes_an_entry(capsys):
    assert command.main(["flamingo.modules.SquaredReLU", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "def forward(self, x: Tensor) -> Tensor:\n    return x.relu().square()" in shown
    assert shown.endswith('"flamingo.modules.SquaredReLU": {\n    "fe4adc1642696e92": "this one",\n},\n')


def test_the_command_knows_a_copy_by_its_code(tmp_path, monkeypatch, capsys):
    source = Path(importlib.import_module("flamingo.modules").__file__).read_text()
    (tmp_path / "their_modules.py").write_text(source.replace("relu().square()", "relu() ** 2"))
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["their_modules.PerceiverAttention", "their_modules.SquaredReLU"]
    assert command.main([*asked, "--version", "theirs 1.0"]) == 0
    attention, activation = capsys.readouterr().out.split("},\n")[:2]
    assert attention.endswith('": "this one",\n')
    assert activation.endswith('": "theirs 1.0",\n')


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_package.Class", "No module named 'no_such_package'"),
        ("flamingo.modules.NoClass", "has no attribute 'NoClass'"),
        ("flamingo.modules.text_time", "it is a function"),
        ("nothing", "No module named 'nothing'"),
    ],
)
def test_the_command_needs_a_class(name, reason, capsys):
    assert command.main([name]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"patch: expected a class of modules with its source, got {name}: ")
    assert reason in shown.err


def inputs(width=8):
    return torch.randn(2, 6, 16), torch.randn(2, 2, 4, width)


def assert_left_alone(module, *tensors, **options):
    """A module that is not swapped, though parts may be, computes what it did; the reason that is given."""
    randomise(module)
    expected = module(*tensors, **options)
    before = type(module)
    report = patch(module)
    assert type(module) is before
    torch.testing.assert_close(module(*tensors, **options), expected)
    return report.skipped[""]


class TestOtherVersions:
    """Releases and branches with the names and arguments of those that are known."""

    def test_flamingo_pytorch_before_0_1_2(self, tmp_path, monkeypatch):
        """It computed the attention of text before the first image to be zeroed, and forgot the result."""
        old = variant(
            third_party.flamingo_pytorch(),
            tmp_path,
            monkeypatch,
            ("attn = attn.masked_fill(text_without", "attn.masked_fill(text_without"),
        )
        x, media = inputs(16)
        attn = old.MaskedCrossAttention(**SIZES)
        assert assert_left_alone(attn, x, media, media_locations=PLACES).startswith(
            "MaskedCrossAttention: its"
        )
        report = patch(block := randomise(old.GatedCrossAttentionBlock(**SIZES)))
        assert list(report.replaced) == [""]  # its own code is known
        assert list(report.skipped) == ["attn"]
        expected = randomise_like(old.GatedCrossAttentionBlock(**SIZES), block)
        torch.testing.assert_close(block(x, media, PLACES), expected(x, media, PLACES))

    def test_open_flamingo_with_a_projection(self, tmp_path, monkeypatch):
        newer = variant(
            third_party.open_flamingo("helpers"),
            tmp_path,
            monkeypatch,
            (
                "self.norm = nn.LayerNorm(dim)\n\n    def forward(self, x):",
                "self.norm = nn.LayerNorm(dim)\n"
                "        self.last = nn.Linear(dim, dim)\n\n    def forward(self, x):",
            ),
            ("return self.norm(latents)", "return self.last(self.norm(latents))"),
        )
        resampler = newer.PerceiverResampler(**SIZES, depth=1, num_latents=3)
        assert "not one that is known" in assert_left_alone(resampler, torch.randn(2, 2, 1, 5, 16))

    def test_open_flamingo_with_fewer_arguments(self, tmp_path, monkeypatch):
        older = variant(
            third_party.open_flamingo("helpers"),
            tmp_path,
            monkeypatch,
            ("media_locations=None, use_cached_media=False", "media_locations=None"),
            ("if not use_cached_media:", "if True:"),
            ("if use_cached_media:", "if False:"),
        )
        module = older.MaskedCrossAttention(**SIZES, dim_visual=8)
        assert "a trial of" in patch(module).notes[""]

    def test_open_flamingo_with_locations_longer_than_the_text(self, tmp_path, monkeypatch):
        """Its branches count all images and take the last rows."""
        newer = variant(
            third_party.open_flamingo("helpers"),
            tmp_path,
            monkeypatch,
            ("media_locations.shape[1] == x.shape[1]", "media_locations.shape[1] >= x.shape[1]"),
            ("media_locations.cumsum(dim=-1)", "media_locations.cumsum(dim=-1)[:, -T_txt:]"),
        )
        module = newer.MaskedCrossAttention(**SIZES, dim_visual=8)
        reason = assert_left_alone(module, *inputs(), PLACES)
        assert 'the call "fewer tokens than locations" is one that the fused class refuses' in reason

    def test_code_without_a_file(self, monkeypatch):
        helpers = third_party.open_flamingo("helpers")
        source = edited(Path(helpers.__file__).read_text(), ("sim = einsum", "sim = 2 * einsum"))
        module = ModuleType(helpers.__name__)
        for name in ("<string>", helpers.__file__):
            exec(compile(source, name, "exec", dont_inherit=True), vars(module))
            attn = module.MaskedCrossAttention(**SIZES, dim_visual=8)
            reason = assert_left_alone(attn, *inputs(), PLACES)
            assert reason.endswith(
                f"cannot be read from {name}" if name == "<string>" else "is not what runs"
            )

    @pytest.mark.parametrize(
        "edit",
        [
            ("torch.ge", "torch.gt"),
            ("text_time == 0", "text_time == 1"),
            ("torch.arange(T_img, device=x.device) + 1", "torch.arange(T_img, device=x.device) + 2"),
            ("if exists(media_locations):", "if not exists(media_locations):"),
            ("use_cached_media=False):", "use_cached_media=True):"),
            ("sim.amax", "sim.amin"),
        ],
        ids=lambda edit: edit[0],
    )
    def test_one_word(self, edit, tmp_path, monkeypatch):
        other = variant(third_party.open_flamingo("helpers"), tmp_path, monkeypatch, edit)
        report = patch(other.MaskedCrossAttention(**SIZES, dim_visual=8))
        assert not report.replaced
        assert "not one that is known" in report.skipped[""]

    def test_words_that_do_nothing(self, tmp_path, monkeypatch):
        other = variant(
            third_party.open_flamingo("helpers"),
            tmp_path,
            monkeypatch,
            ("        # attention\n", ""),
            ("text features", "features of text"),
            ("def forward(self, x, media,", "def forward(self, x: torch.Tensor, media,"),
        )
        assert patch(other.MaskedCrossAttention(**SIZES, dim_visual=8)).replaced


def randomise_like(module, other):
    module.load_state_dict(other.state_dict())
    return module


class TestReplacedFunctions:
    @pytest.mark.parametrize("name", ["rearrange", "rearrange_many", "repeat", "einsum", "exists"])
    def test_of_the_library(self, name, monkeypatch):
        helpers = third_party.open_flamingo("helpers")
        original = getattr(helpers, name)
        monkeypatch.setattr(
            helpers, name, functools.wraps(original)(lambda *args, **kw: original(*args, **kw))
        )
        attn = helpers.MaskedCrossAttention(**SIZES, dim_visual=8)
        assert "not one that is known" in assert_left_alone(attn, *inputs(), PLACES)

    def test_of_the_reference(self, monkeypatch):
        from flamingo import modules

        original = modules.text_time
        monkeypatch.setattr(modules, "text_time", lambda *args, **kwargs: original(*args, **kwargs) * 0)
        attn = modules.MaskedCrossAttention(**SIZES, dim_visual=8)
        assert "not one that is known" in assert_left_alone(attn, *inputs(), PLACES)

    def test_a_call_of_a_subclass(self):
        from flamingo import modules

        class Louder(modules.MaskedCrossAttention):
            def __call__(self, *args, **kwargs):
                return 2 * super().__call__(*args, **kwargs)

        assert "not one that is known" in assert_left_alone(Louder(**SIZES, dim_visual=8), *inputs(), PLACES)

    def test_a_helper_of_a_subclass(self):
        """A resampler computes what its layers do without a call of theirs."""
        from flamingo import modules

        class Halved(modules.PerceiverAttention):
            def _keys_and_values(self, x):
                k, v = super()._keys_and_values(x)
                return k, v / 2

        attn = Halved(**SIZES)
        assert "not one that is known" in assert_left_alone(
            attn, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16)
        )


class TestParts:
    """Classes within a layer that it computes without calling them."""

    @pytest.mark.parametrize(
        ("edit", "path"),
        [
            (
                ("return self.weight * hidden_states", "return (1 + self.weight) * hidden_states"),
                "input_layernorm",
            ),
            (("self.act_fn(self.gate_proj(x)) * self.up", "self.act_fn(self.gate_proj(x)) + self.up"), "mlp"),
            (("self.down_proj(self.act_fn(", "2 * self.down_proj(self.act_fn("), "mlp"),
        ],
        ids=["norm", "glu", "factor"],
    )
    def test_of_idefics(self, edit, path, tmp_path, monkeypatch):
        pytest.importorskip("transformers")
        home = importlib.import_module("transformers.models.idefics.modeling_idefics")
        source = Path(home.__file__).read_text()
        (tmp_path / "variant.py").write_text(edited(source, edit))
        cls = {"mlp": "IdeficsMLP", "input_layernorm": "IdeficsRMSNorm"}[path]
        other = load_within(home, tmp_path / "variant.py", monkeypatch)
        monkeypatch.setattr(home, cls, getattr(other, cls))
        layer = home.IdeficsGatedCrossAttentionLayer(config(), layer_idx=0)
        reason = (
            f"IdeficsGatedCrossAttentionLayer: {path} is a {cls}, and its forward is not one that is known"
        )
        assert patch(layer).skipped[""].startswith(reason)


def load_within(original, path, monkeypatch):
    """A file as a module of the original's package, beside the original."""
    spec = importlib.util.spec_from_file_location(original.__name__, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config():
    from transformers import IdeficsConfig

    return IdeficsConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, vision_config={"embed_dim": 8}
    )
