"""What can be profiled: by name, how to build a model, what it is fed, and what is done with it.

Another model joins with one entry in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flamingo.config import PRESETS

from ...testing import open_gates, tiny
from .parts import BLOCKS, RESAMPLER, VISION
from .subject import (
    DECODE,
    FULL,
    GENERATION,
    PREFILL,
    STEP,
    Plan,
    Sizes,
    Subject,
    Work,
    features,
    tokens,
)


def plan(name: str, sizes: Sizes = FULL) -> Plan:
    """How to build a model of the registry.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"expected a MODEL among {', '.join(MODELS)}, got {name}.")
    return Plan(name, sizes, MODELS[name], needs_memory=name not in PRESETS)


def _flamingo(preset: str, sizes: Sizes, **changes: Any) -> Subject:
    from flamingo import Flamingo, FlamingoConfig, generate

    config = FlamingoConfig.preset(preset, **changes)
    model = open_gates(Flamingo(config).freeze())
    ids = tokens(sizes, 256, config.media_token_id)
    pixels = features(sizes.batch, sizes.media, 1, 3, config.image_size, config.image_size)

    def images(model: Flamingo) -> Tensor:
        return pixels.to(next(model.vision.parameters()).dtype)

    def prefill(model: Flamingo) -> Callable[[], Tensor]:
        seen = images(model)
        return lambda: model(ids, seen).logits

    def decode(model: Flamingo) -> Callable[[], Tensor]:
        media, cache = model.encode_media(images(model)), model.language.new_cache()
        model.decode(ids, media, cache=cache)
        last, seen = media[:, -1:].clone(), torch.ones(sizes.batch, 1, dtype=torch.bool, device=ids.device)

        def token() -> Tensor:
            logits = model.decode(ids[:, -1:], last, cache=cache, media_locations=seen)
            cache.crop(-1)  # so that every call reads the same token
            return logits

        return token

    def step(model: Flamingo) -> Callable[[], Tensor]:
        seen = images(model)
        return lambda: model(ids, seen, labels=ids).loss

    def generation(model: Flamingo) -> Callable[[], Tensor]:
        seen = images(model)
        return lambda: generate(model, ids, seen, max_new_tokens=sizes.new)

    works = {
        PREFILL: Work(prefill, sizes.batch * sizes.text),
        DECODE: Work(decode, sizes.batch, "a token after the whole text, keys and values in the cache"),
        GENERATION: Work(generation, sizes.batch * sizes.new, "images, prompt and all new tokens"),
        STEP: Work(
            step,
            sizes.batch * sizes.text,
            "forward and backward, vision and language model frozen, no optimizer",
        ),
    }
    if not sizes.new:
        del works[GENERATION]
    parts = {"vision": VISION, "resampler": RESAMPLER, r"cross_attn\.\d+": BLOCKS}
    return Subject(model, {"input_ids": ids, "pixels": pixels}, parts, works)


def _third_party(name: str, sizes: Sizes, *, config: Any = None, **wide: Any) -> Subject:
    from .third_party import build

    shape = tiny.Sizes(sizes.batch, sizes.text, sizes.media, **wide)
    return build(name, shape, new=sizes.new, **(config or {}))


# The "small" models are as wide as real ones and have few layers.
WIDE: dict[str, Any] = {"width": 1024, "heads": 16, "visual": 512}
_WIDE_FLAMINGO: dict[str, Any] = {
    "language_dim": 1024,
    "language_heads": 16,
    "cross_attn_heads": 16,
    "cross_attn_dim_head": 64,
    "vision_dim": 512,
    "vision_heads": 8,
    "resampler_dim": 512,
    "resampler_heads": 8,
    "resampler_dim_head": 64,
    "num_latents": 64,
}

# An OpenFlamingo around a language model of the shape of facebook/opt-350m.
OPT_350M = "open_flamingo-opt-350m"
_WIDE_OPT_350M: dict[str, Any] = {"width": 1024, "heads": 16, "layers": 24, "visual": 1024}
_OPT_350M = {
    "language": "OPT",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
}

# Two of the 40 layers of Llama 3.2 Vision 11B, one of them of cross-attention, in their widths, without its
# vocabulary; its images are four tiles of 560 pixels, with 1601 tokens each, of a narrow vision encoder.
MLLAMA_560 = "mllama-560"
_WIDE_MLLAMA: dict[str, Any] = {"width": 4096, "heads": 32, "layers": 2, "visual": 256}
_MLLAMA_560 = {
    "image": 560,
    "patch": 14,
    "most_tiles": True,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}


def _registry() -> dict[str, Callable[[Sizes], Subject]]:
    return {
        **{name: partial(_flamingo, name) for name in PRESETS},
        "flamingo-small": partial(_flamingo, "tiny", **_WIDE_FLAMINGO),
        **{name: partial(_third_party, name) for name in tiny.names()},
        **{small_of(name): partial(_third_party, name, **WIDE) for name in tiny.names()},
        OPT_350M: partial(_third_party, "open_flamingo-tiny", config=_OPT_350M, **_WIDE_OPT_350M),
        MLLAMA_560: partial(_third_party, "mllama-tiny", config=_MLLAMA_560, **_WIDE_MLLAMA),
    }


def small_of(name: str) -> str:
    """The name of the model that is as wide as a real one, from its tiny one's."""
    return name.replace("-tiny", "-small")


MODELS = _registry()
