"""Releases of transformers that are not known yet: they are tried, and swapped if the trial agrees."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from flamingo_kernels import patch
from flamingo_kernels.patch.registry import match
from flamingo_kernels.patch.samples import samples
from flamingo_kernels.testing import tiny
from tests.helpers.variants import edited

pytest.importorskip("transformers")
HOME = "transformers.models"

# By model, class and what it computes: an edit that changes no result, and edits that do.
RELEASES = {
    ("mllama", "MllamaTextCrossAttention"): (
        ("attn_output = self.o_proj(attn_output)", "attn_output = 1 * self.o_proj(attn_output)"),
        [
            ("query_states = self.q_norm(query_states)", "query_states = query_states"),
            ("key_states = self.k_norm(key_states)", "key_states = key_states"),
            (
                "scaling=self.scaling,\n            **kwargs",
                "scaling=2 * self.scaling,\n            **kwargs",
            ),
            ("key_states, value_states, self.layer_idx", "value_states, key_states, self.layer_idx"),
            ("cache.layers[self.layer_idx].keys,", "-cache.layers[self.layer_idx].keys,"),
        ],
    ),
    ("mllama", "MllamaCrossAttentionDecoderLayer"): (
        (
            "self.cross_attn_mlp_gate.tanh() * hidden_states",
            "hidden_states * self.cross_attn_mlp_gate.tanh()",
        ),
        [
            ("self.cross_attn_attn_gate.tanh()", "self.cross_attn_attn_gate.sigmoid()"),
            ("full_text_row_masked_out_mask[:, 0] * hidden_states", "hidden_states"),
            ("if full_text_row_masked_out_mask is not None:", "if position_ids is not None:"),
        ],
    ),
    ("idefics", "IdeficsGatedCrossAttentionLayer"): (
        (
            "self.act_dense(self.alpha_dense) * hidden_states",
            "hidden_states * self.act_dense(self.alpha_dense)",
        ),
        [
            ("(cross_attention_gate == 0)", "(cross_attention_gate != 0)"),
            ("self.act_cross_attn(self.alpha_cross_attn)", "self.alpha_cross_attn"),
            ("p=self.config, training=self.training", "p=0.05, training=self.training"),
        ],
    ),
    ("idefics2", "Idefics2PerceiverAttention"): (
        ("[context, latents], dim=-2", "(context, latents), dim=-2"),
        [
            ("[context, latents], dim=-2", "[context, context[:, :q_len]], dim=-2"),
            (
                "attn_output, attn_weights = attention_interface(",
                "attention_mask = None\n        attn_output, attn_weights = attention_interface(",
            ),
        ],
    ),
    ("evolla", "EvollaSequenceCompressorAttention"): (
        ("q = q * self.scale", "q = self.scale * q"),
        [
            ("(1 - mask).bool()", "mask.bool()"),
            ("torch.cat((x, latents), dim=-2)", "torch.cat((x, x[:, :3]), dim=-2)"),
        ],
    ),
    ("evolla", "EvollaSequenceAlignerCrossAttention"): (
        ("query_layer = query_layer * self.scale", "query_layer = self.scale * query_layer"),
        [
            ("torch.tanh(self.gate_attention) * hidden_states", "torch.tanh(self.gate_ffw) * hidden_states"),
            ("* protein_batch_mask.expand(size=(protein_kv_seq_len, bs)).T", "+ 0"),
        ],
    ),
}
CASES = [
    pytest.param(model, cls, edit, right, id=f"{cls}-{i}", marks=[pytest.mark.slow] * (i > 1))
    for (model, cls), (same, others) in RELEASES.items()
    for i, (edit, right) in enumerate([(same, True), *((other, False) for other in others)])
]


@pytest.mark.parametrize(("model", "cls", "edit", "right"), CASES)
def test_a_release_of_other_source(model, cls, edit, right, tmp_path, monkeypatch):
    """Each part is compared on its own: the edit stands within the class."""
    module = next(
        m for m in release(model, cls, edit, tmp_path, monkeypatch).modules() if type(m).__name__ == cls
    )
    before = type(module)
    report = patch(module)
    if right:
        assert type(module) is not before
        assert "a trial of" in report.notes[""]
    else:
        assert type(module) is before
        assert "not one that is known" in report.skipped[""]


def release(model, cls, edit, folder, monkeypatch):
    """A tiny model whose home has an edit within one class."""
    home = importlib.import_module(f"{HOME}.{model}.modeling_{model}")
    built = tiny.build(f"{model}-tiny").model  # transformers keeps the classes that it finds at first
    source = Path(home.__file__).read_text()
    begin = source.index(f"class {cls}(")
    end = source.index("\nclass ", begin)
    path = folder / "release.py"
    path.write_text(source[:begin] + edited(source[begin:end], edit) + source[end:])
    spec = importlib.util.spec_from_file_location(home.__name__, path)
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, home.__name__, other)
    spec.loader.exec_module(other)
    monkeypatch.setattr(home, cls, getattr(other, cls))
    for module in built.modules():
        if type(module).__name__ == cls:
            module.__class__ = getattr(other, cls)
    return built


@pytest.mark.parametrize("name", ["mllama-tiny", "idefics-tiny", "idefics2-tiny", "evolla-tiny"])
def test_every_class_has_a_sample(name):
    found = [known.fused for module in tiny.build(name).model.modules() if (known := match(type(module)))]
    assert found
    assert set(found) <= samples().keys()


def test_random_numbers_outside_are_not_touched(tmp_path, monkeypatch):
    model = release(
        "evolla",
        "EvollaSequenceCompressorAttention",
        ("q = q * self.scale", "q = self.scale * q"),
        tmp_path,
        monkeypatch,
    )
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert patch(model).notes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
