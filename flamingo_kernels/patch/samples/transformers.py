"""Small instances of the classes of transformers, and calls in which a new release may turn out to differ.

Masks are added to the scores: 0 where a row sees a key, the lowest number where it does not.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import evolla, idefics, idefics2, mllama
from .call import Arguments, Call, Sample, randn

_TEXT, _MEDIA, _LATENTS, _WIDTH = 6, 2, 4, 16
# Which of two media each token sees; the first token sees none.
_SEEN = torch.tensor(
    [[[0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 1]], [[0, 0], [0, 0], [0, 1], [0, 1], [0, 1], [0, 1]]]
)
_KEYS = _SEEN.repeat_interleave(_LATENTS, dim=-1).bool()  # [B, T, S]
_ALL, _NONE = torch.ones_like(_KEYS), torch.zeros_like(_KEYS)
_WITH_GAPS = _KEYS & (torch.arange(_MEDIA * _LATENTS) % 3 > 0)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:  # [B, 1, T, S]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _of_config(sizes: Mapping[str, Any], cls: type[Any], module: Any) -> nn.Module:
    """A layer of the user's configuration with other sizes."""
    own = getattr(module, "config", None)
    config: Any = copy.deepcopy(own if hasattr(own, "hidden_size") else module.cross_attn.config)
    for path, size in sizes.items():
        *parts, name = path.split(".")
        setattr(functools.reduce(getattr, parts, config), name, size)
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation = "sdpa"
    layer: nn.Module = cls(config, layer_idx=0)
    return layer


_LLAMA = {"hidden_size": _WIDTH, "num_attention_heads": 4, "intermediate_size": 24}


def _masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        "text before, at and after images": _additive(_KEYS | ~_KEYS.any(-1, keepdim=True), dtype),
        "gaps between the keys": _additive(_WITH_GAPS | ~_WITH_GAPS.any(-1, keepdim=True), dtype),
        "every key": _additive(_ALL, dtype),
        "no mask": None,
        "a bias for a mask": _additive(_ALL, dtype) - 1.5 * _KEYS[:, None],
    }


def _mllama_calls(module: nn.Module) -> Iterator[Call]:
    """Two images of one tile: as they are, kept in a cache, and both."""
    layer = hasattr(module, "cross_attn")
    attn: Any = module.cross_attn if layer else module

    def call(title: str, mask: str, *, length: int = _TEXT, states: bool = True, cache: bool = False) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x = randn(dtype, 2, length, _WIDTH)
            media = randn(dtype, 2 * _MEDIA, _LATENTS, _WIDTH) if states else None
            kept = _cache(attn, dtype, filled=not states) if cache else None
            chosen = _masks(dtype)[mask]
            chosen = chosen if chosen is None else chosen[:, :, -length:]
            if not layer:
                return (x, media, kept, chosen), {}
            rows = _KEYS.any(-1)[:, None, -length:, None].to(dtype)
            return (x, media, chosen, None, None if mask == "no mask" else rows, None, kept), {}

        return Call(title, make)

    for mask in _masks(torch.float64):
        yield call(mask, mask)
        yield call(f"{mask}, into a cache", mask, cache=True)
        yield call(f"{mask}, from a cache", mask, states=False, cache=True)
        yield call(f"a step, {mask}", mask, length=1, states=False, cache=True)
    yield call("neither images nor a cache", "no mask", states=False)


def _cache(attn: Any, dtype: torch.dtype, *, filled: bool) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    if filled:
        shape = (2, attn.num_key_value_heads, _MEDIA * _LATENTS, attn.head_dim)
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), 0)
    return cache


def _idefics_calls(module: Any) -> Iterator[Call]:
    visual: int = module.cross_attn.k_proj.in_features

    def call(title: str, seen: Tensor | None, *, bias: float = 0, length: int = _TEXT) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x, media = randn(dtype, 2, length, _WIDTH), randn(dtype, 2, _MEDIA * _LATENTS, visual)
            rows = (_ALL if seen is None else seen)[:, -length:]
            mask = None if seen is None else _additive(rows, dtype) + bias * _KEYS[:, None, -length:]
            return (x, None, media, mask, rows.any(-1).to(dtype)), {}

        return Call(title, make)

    for name, seen in (
        ("text before, at and after images", _KEYS),
        ("gaps between the keys", _WITH_GAPS),
        ("every key", _ALL),
        ("no image", _NONE),
        ("no mask", None),
    ):
        yield call(name, seen)
        yield call(f"a step, {name}", seen, length=1)
    yield call("a bias for a mask", _ALL, bias=-1.5)


def _build_idefics_perceiver(cls: type[Any], module: Any) -> nn.Module:
    layer: nn.Module = cls(embed_dim=_WIDTH, n_heads=2, head_dim=4, qk_layer_norms=module.qk_layer_norms)
    return layer


def _idefics_perceiver_calls(module: nn.Module) -> Iterator[Call]:
    def call(title: str, features: int, latents: int, size: float = 1) -> Call:
        return Call(
            title,
            lambda dtype: (
                (randn(dtype, 2, features, _WIDTH, size=size), randn(dtype, 2, latents, _WIDTH)),
                {},
            ),
        )

    yield call("more features than latents", 7, 3)
    yield call("fewer features than latents", 2, 5)
    yield call("one of each", 1, 1)
    yield call("large features", 7, 3, size=1e3)


def _idefics2_calls(module: nn.Module) -> Iterator[Call]:
    def call(title: str, features: int, latents: int, seen: Callable[[Tensor], Tensor] | None) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            mask = None
            if seen is not None:
                rows = seen(torch.ones(2, latents, features + latents, dtype=torch.bool))
                mask = _additive(rows, dtype)
            return (randn(dtype, 2, latents, _WIDTH), randn(dtype, 2, features, _WIDTH), mask), {}

        return Call(title, make)

    yield call("no mask", 7, 3, None)
    yield call("fewer features than latents", 2, 5, None)
    yield call("every key", 7, 3, lambda seen: seen)
    yield call("padding at the end", 7, 3, functools.partial(_hide, slice(4, 7)))
    yield call("padding at the beginning", 7, 3, functools.partial(_hide, slice(0, 2)))
    yield call("padding among the features", 7, 3, functools.partial(_hide, slice(2, 4)))
    yield call("hidden latents", 7, 3, functools.partial(_hide, slice(8, 9)))
    yield call("another mask for every latent", 7, 3, lambda seen: seen.tril(7))


def _hide(keys: slice, seen: Tensor) -> Tensor:
    seen[1, :, keys] = False
    return seen


def _build_evolla_perceiver(cls: type[Any], module: nn.Module) -> nn.Module:
    layer: nn.Module = cls(_WIDTH, dim_head=4, heads=2)
    return layer


def _evolla_perceiver_calls(module: nn.Module) -> Iterator[Call]:
    for title, hidden in (
        ("every key", []),
        ("padding at the end", [5, 6]),
        ("padding in between", [0, 3]),
        ("hidden latents", [8]),
    ):
        yield Call(title, functools.partial(_evolla_perceiver_call, hidden))


def _evolla_perceiver_call(hidden: list[int], dtype: torch.dtype) -> Arguments:
    mask = torch.ones(2, 7 + 3, dtype=dtype)
    mask[1, hidden] = 0
    return (randn(dtype, 2, 7, _WIDTH), randn(dtype, 2, 3, _WIDTH), mask), {}


def _build_evolla(cls: type[Any], module: Any) -> nn.Module:
    config = SimpleNamespace(
        hidden_size=_WIDTH,
        num_attention_heads=4,
        aligner_attention_probs_dropout_prob=module.dropout.p,
        aligner_enable_bias=module.out_proj.bias is not None,
        aligner_ffn_mult=2,
    )
    kinds = ("protein", "structure", "msa")
    widths = {f"{kind}_encoder_dim": 12 for kind in kinds if getattr(module, f"key_{kind}") is not None}
    layer: nn.Module = cls(config, **widths)
    return layer


def _evolla_calls(module: nn.Module) -> Iterator[Call]:
    def call(title: str, rows: list[list[int]], batch: list[int], keys: int = 5) -> Call:
        def make(dtype: torch.dtype) -> Arguments:
            x, protein = randn(dtype, 2, len(rows[0]), _WIDTH), randn(dtype, 2, keys, 12)
            masks = {"protein_batch_mask": torch.tensor(batch)}
            return (x, protein, None, None, torch.tensor(rows)), masks

        return Call(title, make)

    yield call("text without padding", [[1, 1, 1, 1], [1, 1, 1, 1]], [1, 1])
    yield call("padded text", [[0, 0, 1, 1], [1, 1, 1, 0]], [1, 1])
    yield call("a sequence without a protein", [[1, 1, 1, 1], [1, 1, 1, 1]], [1, 0])
    yield call("no protein", [[1, 1, 1, 1], [1, 1, 1, 1]], [0, 0])
    yield call("one token and one key", [[1], [1]], [1, 1], keys=1)


SAMPLES: Mapping[type[nn.Module], Sample] = {
    mllama.MllamaTextCrossAttention: Sample(
        functools.partial(_of_config, {**_LLAMA, "num_key_value_heads": 2}), _mllama_calls
    ),
    mllama.MllamaCrossAttentionDecoderLayer: Sample(
        functools.partial(_of_config, {**_LLAMA, "num_key_value_heads": 2}), _mllama_calls
    ),
    idefics.IdeficsGatedCrossAttentionLayer: Sample(
        functools.partial(_of_config, {**_LLAMA, "vision_config.embed_dim": 12}), _idefics_calls
    ),
    idefics.IdeficsPerceiverAttention: Sample(_build_idefics_perceiver, _idefics_perceiver_calls),
    idefics2.Idefics2PerceiverAttention: Sample(
        functools.partial(
            _of_config,
            {
                "hidden_size": _WIDTH,
                "resampler_n_heads": 4,
                "resampler_head_dim": 4,
                "num_key_value_heads": 2,
            },
        ),
        _idefics2_calls,
    ),
    evolla.EvollaSequenceCompressorAttention: Sample(_build_evolla_perceiver, _evolla_perceiver_calls),
    evolla.EvollaSequenceAlignerCrossAttention: Sample(_build_evolla, _evolla_calls),
}
