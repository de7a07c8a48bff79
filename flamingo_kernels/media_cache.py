"""Keys and values of the media: for all layers in one product, and never twice for the same media."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._kept import kept_kv
from ._labels import PROJECTIONS, labelled
from ._predicates import autocast_dtype, is_ordinary, is_plain, needs_grad


class Source(NamedTuple):
    """How a layer makes its keys and values: `linear(norm(media))`.

    Args:
        linear: the projection to keys and values side by side, `[2 H d, D]`.
        heads: the number of heads H.
        norm: a norm over the features, or None.
    """

    linear: Any
    heads: int
    norm: Any = None

    def project(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., H, d]` of media `[..., D]`."""
        return self.split(self.linear(media if self.norm is None else self.norm(media)))

    def parameters(self) -> list[Tensor]:
        norm = [] if self.norm is None else [*self.norm.parameters()]
        return [*self.linear.parameters(), *norm]

    def split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k, v

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one product that follows a norm without parameters.

        `linear(weight * xhat + bias) = (linear.weight * weight) xhat + linear.weight bias`
        """
        if self.norm is None or not self.norm.elementwise_affine:
            return self.linear.weight, self.linear.bias
        dtype, bias = self.linear.weight.dtype, self.linear.bias
        weight = (self.linear.weight * self.norm.weight).to(dtype)
        if self.norm.bias is not None:
            moved = self.linear.weight @ self.norm.bias.to(dtype)
            bias = moved if bias is None else bias + moved
        return weight, bias


def keys_and_values(sources: Sequence[Source], media: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every layer's keys and values, in one product if all norms are alike; the product has their parameters.

    So a backward pass keeps the normed media once. If the media need no gradient, the norms' parameters get
    theirs from the weights, without a product over the media. Without a backward pass a CPU takes one product
    a layer: a single one would be no faster, and joining the weights takes half as long as the product. So it
    does for media that need a gradient and are few: the weights of all would be kept, which are more.
    """
    parameters = [parameter for source in sources for parameter in source.parameters()]
    one_by_one = media.device.type == "cpu" and not needs_grad(media, *parameters)
    if one_by_one or not _alike(sources) or _are_few(media, sources[0].linear):
        return [source.project(media) for source in sources]
    norm = sources[0].norm
    xhat = media if norm is None else F.layer_norm(media, norm.normalized_shape, eps=norm.eps)
    weights, biases = zip(*(source.folded() for source in sources), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    kv = F.linear(xhat, torch.cat(weights), bias).split([len(weight) for weight in weights], dim=-1)
    return [source.split(each) for source, each in zip(sources, kv, strict=True)]


def _are_few(media: Tensor, linear: nn.Linear) -> bool:
    """Whether media that need a gradient are fewer than a weight's rows, on a CPU."""
    fewer = media.numel() < linear.out_features * media.shape[-1]
    return media.device.type == "cpu" and media.requires_grad and fewer


def _alike(sources: Sequence[Source]) -> bool:
    """Whether one product can serve all: plain linear layers, and norms that differ only in parameters."""

    def kind(source: Source) -> tuple[Any, ...]:
        biased = source.linear.bias is not None
        if source.norm is None:
            return None, biased
        return source.norm.eps, source.norm.normalized_shape, biased or source.norm.bias is not None

    plain = all(
        is_plain(source.linear, nn.Linear)
        and (source.norm is None or is_plain(source.norm, nn.LayerNorm))
        and all(map(is_ordinary, source.parameters()))
        for source in sources
    )
    return plain and len({kind(source) for source in sources}) == 1


class MediaCache:
    """The keys and values of a prompt's media in every cross-attention layer; passed instead of the media.

    ::

        cache = MediaCache(model, media)                              for all layers
        block(x, cache, media_locations)                              prefill
        block(x, cache, media_locations, use_cached_media=True)       decoding

    The batch of text may be a multiple of the cache's: then each sequence of media serves several texts in a
    row, such as beams, without a copy. For inference: no gradient goes through the cache.

    Args:
        model: a patched model, or part of one; its fused cross-attention modules get their keys and values.
        media: `[B, M, R, D_visual]`, as the blocks take it.

    Raises:
        ValueError: the model has no fused cross-attention module.
        TypeError: later, when it is used, or added to, in another dtype than it was made in, without
            autocast.

    Attributes:
        shape: the shape of the media.

    Limits: holds 2 * B * M * R * H * d numbers a layer, in the dtype that its projection gave; under autocast
    every call casts them. Later changes of parameters have no effect on it.

    Source: Flamingo (arXiv 2204.14198), section 2.3.

    Example:
        >>> from flamingo import GatedCrossAttentionBlock
        >>> from flamingo_kernels import patch
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
        >>> _ = patch(block)
        >>> x, media, locations = torch.randn(1, 3, 16), torch.randn(1, 1, 5, 8), torch.tensor([[1, 0, 0]])
        >>> cache = MediaCache(block, media)
        >>> torch.equal(block(x, cache, locations), block(x, media, locations))
        True
    """

    def __init__(self, model: nn.Module, media: Tensor) -> None:
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "media_source")]
        sources = {layer: layer.media_source() for layer in layers}
        if not sources:
            raise ValueError(
                f"MediaCache: expected a model with fused cross-attention, got {type(model).__name__}; "
                "patch(model) first."
            )
        self.shape = media.shape
        self._sources = sources
        self._layers = self._compute(media)

    def _compute(self, media: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            every = keys_and_values(list(self._sources.values()), media)
        return dict(zip(self._sources, every, strict=True))

    def append(self, media: Tensor) -> None:
        """Add media `[B, M', R, D_visual]` that come later, as in another turn."""
        new = self._compute(media)
        for layer, (k, _) in self._layers.items():
            _expect_dtype("media whose keys are", new[layer][0], k.dtype, "those before")
        batch, more, *rest = media.shape
        self.shape = torch.Size((batch, self.shape[1] + more, *rest))
        for layer, kept in self._layers.items():
            k, v = (torch.cat(pair, dim=1) for pair in zip(kept, new[layer], strict=True))
            self._layers[layer] = k, v

    def __getitem__(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, M, R, H, d]` of a layer."""
        if layer not in self._layers:
            raise ValueError(
                f"MediaCache: expected a layer of the model it was made for, got a {type(layer).__name__} of "
                "another; make a cache for that one."
            )
        return self._layers[layer]

    def of(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for a text x: in the dtype of x, unless autocast will cast them."""
        k, v = self[layer]
        if autocast_dtype(x.device) is None:
            _expect_dtype("keys and values", k, x.dtype, "x")
        return k, v


def _expect_dtype(what: str, keys: Tensor, dtype: torch.dtype, like: str) -> None:
    if keys.dtype != dtype:
        raise TypeError(
            f"MediaCache: expected {what} in {dtype} like {like}, got {keys.dtype}; make the cache as the "
            "model is called, both under torch.autocast or both without it, and in one dtype."
        )


class MediaLayer(Protocol):
    """A layer with keys and values of media."""

    def media_source(self) -> Source: ...


@labelled(PROJECTIONS)
def load_or_project(
    layer: MediaLayer, x: Tensor, media: Tensor | MediaCache | tuple[Tensor, Tensor], *, follows: bool
) -> tuple[Tensor, Tensor]:  # [B, M, R, H, d] each
    """A layer's keys and values for a text x: given, cached, new, or the last ones if x `follows` a text."""
    if isinstance(media, tuple):
        return media
    if isinstance(media, MediaCache):
        return media.of(cast(nn.Module, layer), x)
    if media.shape[0] not in (1, x.shape[0]):  # open_flamingo broadcasts one
        raise ValueError(
            f"MaskedCrossAttention: expected media with B={len(x)} like x, got {len(media)}; "
            "texts that share media take a MediaCache."
        )
    source = layer.media_source()
    modules = (source.linear,) if source.norm is None else (source.linear, source.norm)
    return kept_kv(layer, media, modules, lambda: source.project(media), step=follows)
