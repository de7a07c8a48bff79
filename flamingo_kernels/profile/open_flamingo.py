"""A tiny model from open-flamingo's own modules, around a small language model of `flamingo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.language import LanguageModel
from flamingo.transformer import TransformerLayer

from ..tiny import open_flamingo_module
from .models import DECODE, PREFILL, STEP, Sizes, Subject, Work, features, open_gates, tokens
from .parts import BLOCKS, RESAMPLER

VOCABULARY, IMAGE = 65, 64
WIDTH, VISUAL, HEADS, LAYERS = 128, 64, 4, 4


def build(sizes: Sizes) -> Subject:
    """An entry of `MODELS`.

    Raises:
        ImportError: open_flamingo or einops_exts is not installed.
    """
    model = _Model()
    open_gates(model)
    ids, vision_x = tokens(sizes, IMAGE, IMAGE), features(1, sizes.media, 1, 49, VISUAL)

    def images(model: _Model) -> Tensor:
        return vision_x.to(model.perceiver.latents.dtype)

    def prefill(model: _Model) -> Callable[[], Tensor]:
        seen = images(model)
        return lambda: model(seen, ids)

    def decode(model: _Model) -> Callable[[], Tensor]:
        model.condition(images(model))
        return lambda: model.read(ids)[:, -1:]

    def step(model: _Model) -> Callable[[], Tensor]:
        seen = images(model)
        return lambda: nn.functional.cross_entropy(model(seen, ids)[0, :-1], ids[0, 1:])

    note = "its stand-in for a language model has no self-attention cache: every token reads the whole text"
    works = {
        PREFILL: Work(prefill, sizes.text),
        DECODE: Work(decode, 1, note),
        STEP: Work(step, sizes.text, "forward and backward, language model frozen, no optimizer"),
    }
    parts = {"perceiver": RESAMPLER, r"language\.gated_cross_attn_layers\.\d+": BLOCKS}
    return Subject(model, {"lang_x": ids, "vision_x": vision_x}, parts, works)


class _Model(nn.Module):
    """What open-flamingo's Flamingo class does around the parts, from a vision encoder's features on."""

    def __init__(self) -> None:
        super().__init__()
        helpers, lm, utils = map(open_flamingo_module, ("helpers", "flamingo_lm", "utils"))
        self.perceiver = helpers.PerceiverResampler(dim=VISUAL, depth=2, dim_head=16, heads=HEADS)
        language: Any = _Language(dim=WIDTH, heads=HEADS, layers=LAYERS)
        language.requires_grad_(False)
        utils.extend_instance(language, lm.FlamingoLMMixin)
        language.set_decoder_layers_attr_name("layers")
        language.init_flamingo(IMAGE, WIDTH, VISUAL, 2, gradient_checkpointing=False)
        self.language = language

    def forward(self, vision_x: Tensor, lang_x: Tensor) -> Tensor:
        self.condition(vision_x)
        return self.read(lang_x)

    def condition(self, vision_x: Tensor) -> None:
        media = self.perceiver(vision_x)
        for layer in self.language._get_decoder_layers():
            layer.condition_vis_x(media)

    def read(self, lang_x: Tensor) -> Tensor:
        return self.language(lang_x, torch.ones_like(lang_x))


class _Language(LanguageModel):
    """Called, and calling its layers, as open-flamingo's mixin expects."""

    def __init__(self, *, dim: int, heads: int, layers: int) -> None:
        super().__init__(vocab_size=VOCABULARY, dim=dim, layers=layers, heads=heads)
        self.layers = nn.ModuleList(_Layer(dim, heads, causal=True) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        angles, _ = self.positions_and_mask(input_ids, None)  # nothing is padded
        for layer in self.layers:
            x = layer(x, angles=angles)
        return self.logits(x)


class _Layer(TransformerLayer):
    def forward(
        self, x: Tensor, angles: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, angles)
