"""The layers of `flamingo`, computed by this library's operators: the same parameters, another forward.

Each class subclasses the module of the same name in `flamingo.modules`, so constructor arguments, parameter
names and `state_dict` are its own by construction. `patch` gives these classes to the modules of a model that
exists already; the functions below them serve its adapters for other libraries too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flamingo import modules

from . import _dispatch, _plain
from ._checks import has_hooks_below, is_plain
from ._decode import decode, may_decode
from ._kept_mask import MaskKey, kept_mask
from ._parts import ATTENTION, in_part
from .fold import Affine, Gate, Scale, put_originals
from .mask import MediaMask
from .media_cache import MediaCache, Source, keys_and_values, media_of
from .ops import gated_residual, masked_cross_attention, perceiver_attention
from .patch.anatomy import Alpha, Kind, Linear, Norm, Number, Part, Weight
from .sublayers import gated_cross_attention, gated_feed_forward


class Fused(nn.Module):
    """What every fused layer is an instance of; its repr names the backend.

    Attributes:
        fixes: the known bugs of the module it stands for that it does not repeat, see `patch`.
        folds: what `fold` may multiply into its weights.
        folded: by path what it had before `fold`; empty before.
        anatomy: what a module that it stands for is made of.
    """

    fixes: frozenset[str] = frozenset()
    folds: tuple[Affine | Gate | Scale, ...] = ()
    folded: Mapping[str, Any] = {}
    anatomy: Mapping[str, Kind] = {}

    def is_watched(self) -> bool:
        """Whether hooks see how it calls its parts. Then they are called by the forward it stands for.

        That repeats known bugs: where these are fixed the parts are called from here.
        """
        return not self.fixes and has_hooks_below(self)

    def train(self, mode: bool = True) -> Any:
        if mode and self.folded:
            raise RuntimeError(
                f"{type(self).__name__}: folded for inference; unfold(model) before training it."
            )
        return super().train(mode)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        put_originals(self, state, prefix)
        return state

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.folded:
            raise RuntimeError(f"{type(self).__name__}: folded for inference; unfold(model) before loading.")
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"backend={_dispatch.default_backend}"]))


ATTENTION_ANATOMY: Mapping[str, Kind] = {
    "heads": Number("H"),
    "norm": Norm("D"),
    "to_q": Linear("D", "H*d"),
    "to_kv": Linear("V", "2*H*d"),
    "to_out": Linear("H*d", "D"),
}
BLOCK_ANATOMY: Mapping[str, Kind] = {
    "attn": Part(),
    "attn_gate": Alpha("D"),
    "ff": Part(),
    "ff_gate": Alpha("D"),
}
PERCEIVER_ANATOMY: Mapping[str, Kind] = {
    "heads": Number("H"),
    "norm_media": Norm("D"),
    "norm_latents": Norm("D"),
    "to_q": Linear("D", "H*d"),
    "to_kv": Linear("D", "2*H*d"),
    "to_out": Linear("H*d", "D"),
}
ATTENTION_FOLDS = (Affine("norm", ("to_q",)), Scale("scale", ("to_q",)))
BLOCK_FOLDS = (Gate("attn_gate", "attn.to_out"), Affine("ff.0", ("ff.1",)), Gate("ff_gate", "ff.3"))


class MaskedCrossAttention(Fused, modules.MaskedCrossAttention):
    """Text attends to the media that come before it, without a score for any other.

    ::

        to_out(masked_cross_attention(to_q(LN(x)), *to_kv(media), mask))

        text       a  <image>  b  c  <image>  d
        medium 0   .     #     #  #     .     .        # attended, . never computed
        medium 1   .     .     .  .     #     #

    Args: those of `flamingo.modules.MaskedCrossAttention`, also those of `forward`.

    The `MediaMask` is built by the first layer of a forward pass that meets a `media_locations` tensor and
    kept for the next ones: pass all layers the same tensor. One made under `torch.inference_mode` counts no
    changes, so every layer reads it anew.

    Without gradients, keys and values are kept for text that follows (`use_cached_media=True`), until a call
    without it, other media, or the end of these. They are made anew if media or weights were changed; what
    torch does not count, as through `.data` or NumPy, is seen on a CPU in a sample of the numbers, and on a
    GPU not at all. A `MediaCache` keeps them for longer.

    Raises: what `masked_cross_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.3.

    Example:
        >>> attn = MaskedCrossAttention(dim=16, dim_visual=8, dim_head=4, heads=2)
        >>> x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 5, 8)
        >>> attn(x, media, torch.tensor([[0, 1, 0, 0, 1, 0]])).shape
        torch.Size([1, 6, 16])
    """

    folds = (*ATTENTION_FOLDS, Affine("norm_media", ("to_kv",)))
    anatomy = {**ATTENTION_ANATOMY, "norm_media": Norm("V", identity=True)}

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        if self.is_watched() and not isinstance(media, MediaCache):
            return super().forward(x, media, media_locations, use_cached_media)
        if not isinstance(media, MediaCache):
            modules.check_cross_attention_inputs(x, media, media_locations)
        return attend_to_media(self, x, media, media_locations, use_cached_media)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, media_locations: Tensor | None, use_cached_media: bool
    ) -> Tensor:
        return attend(self, q, k, v, media_locations, use_cached_media)

    def media_source(self) -> Source:
        norm = self.norm_media if isinstance(self.norm_media, nn.LayerNorm) else None
        return Source(self.to_kv, self.heads, norm)


class GatedCrossAttentionBlock(Fused, modules.GatedCrossAttentionBlock):
    """GATED XATTN-DENSE, each of its two sublayers as one node of autograd.

    ::

        z = gated_cross_attention(x, keys and values of media, mask, LN, to_q, to_out, attn_gate)
        gated_feed_forward(z, LN, hidden, output, ff_gate)

    Args: those of `flamingo.modules.GatedCrossAttentionBlock`, also those of `forward`; the media may be a
    `MediaCache`.

    A sublayer that is not plain, as with hooks, adapters or weights of a tensor subclass, is called as a
    module, and its gate and residual take one pass. Gates in float32 promote the result as in the reference.

    Raises: what the operators raise. Determinism: theirs.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4.

    Example:
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
        >>> x, media = torch.randn(1, 3, 16), torch.randn(1, 1, 5, 8)
        >>> torch.equal(block(x, media, torch.tensor([[1, 0, 0]])), x)
        True
    """

    folds = BLOCK_FOLDS
    anatomy = BLOCK_ANATOMY

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn.__class__ = MaskedCrossAttention

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        if self.is_watched():
            return super().forward(x, cast(Tensor, media), media_locations, use_cached_media)
        return gated_block(self, x, media, media_locations, use_cached_media)


class PerceiverAttention(Fused, modules.PerceiverAttention):
    """Latents attend to the features of their medium and to themselves, two segments never concatenated.

    Args: those of `flamingo.modules.PerceiverAttention`, also those of `forward`.

    Raises: what `perceiver_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.1 and figure 5.

    Example:
        >>> attn = PerceiverAttention(dim=16, dim_head=4, heads=2)
        >>> attn(torch.randn(2, 1, 9, 16), torch.randn(2, 1, 4, 16)).shape
        torch.Size([2, 1, 4, 16])
    """

    anatomy = PERCEIVER_ANATOMY

    def attend(
        self,
        q: Tensor,
        k_media: Tensor,
        v_media: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        media_lengths: Tensor | None = None,
    ) -> Tensor:
        return perceiver_attention(
            q, k_media, v_media, k_latents, v_latents, media_lengths=media_lengths, scale=self.scale
        )


class PerceiverResampler(Fused, modules.PerceiverResampler):
    """Any number of visual features of a medium to a fixed number of latents, through `PerceiverAttention`.

    Args: those of `flamingo.modules.PerceiverResampler`, also those of `forward`.

    Source: Flamingo (arXiv 2204.14198), section 2.1 and figure 5.

    Example:
        >>> resampler = PerceiverResampler(dim=16, depth=1, dim_head=4, heads=2, num_latents=5)
        >>> resampler(torch.randn(2, 3, 1, 9, 16)).shape
        torch.Size([2, 3, 5, 16])
    """

    anatomy = {
        "project_input": Part(),
        "latents": Weight("R D"),
        "frame_embs": Weight("K D", optional=True),
        "media_time_embs": Weight("M 1 D", optional=True),
        "layers": Part(nn.ModuleList),
        "norm": Norm("D"),
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for layer in self.layers:
            attn, _ = cast(nn.ModuleList, layer)
            attn.__class__ = PerceiverAttention

    def resample(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if self.is_watched():
            return super().resample(x, lengths)
        return resample(self.latents, self.layers, x, lengths)


def attend_to_media(
    attn: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """What a masked cross-attention module computes, operator by operator."""
    k, v = media_of(attn, x, media, follows=use_cached_media)
    q = attn.to_q(attn.norm(x)).unflatten(-1, (attn.heads, -1))  # [B, T, H, d]
    return attn.to_out(attn.attend(q, k, v, media_locations, use_cached_media).flatten(-2))


def attend(
    attn: Any,
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, H, d], or with a divisor of B, of which each serves as many texts in a row
    v: Tensor,  # like k
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, H, d]
    """The core of a masked cross-attention module."""
    mask = mask_of(attn, q, k, media_locations, use_cached_media)
    return masked_cross_attention(_fold(q, k), k, v, mask, scale=attn.scale).view(q.shape)


def gated_block(
    block: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """What a gated cross-attention block computes, by sublayers where they are plain."""
    given = (x, media, media_locations, use_cached_media)
    inputs = _inputs_of(block.attn, *given)
    decoded = None if inputs is None or not may_decode(x) else _decoded(block, x, inputs)
    if decoded is not None:
        return decoded
    z = _add_attended(block, inputs, *given)
    return add_feed_forward(z, block.ff, gate_of(block, "ff_gate"))


def add_attended(
    block: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    """`x + tanh(attn_gate) * attn(x, media)`, as one sublayer where attn is plain."""
    given = (x, media, media_locations, use_cached_media)
    return _add_attended(block, _inputs_of(block.attn, *given), *given)


class _Inputs(NamedTuple):
    """What an attention of plain parts is made of beside the text."""

    parts: _plain.CrossAttention
    k: Tensor  # [B, M, R, H, d], or with a divisor of B
    v: Tensor
    mask: MediaMask


def _inputs_of(
    attn: Any,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,  # [B, M, R, D_visual]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> _Inputs | None:
    fused = _is_fused(attn)
    parts = _plain.cross_attention_of(x, attn.norm, attn.to_q, attn.to_out) if fused else None
    if parts is None:
        return None
    k, v = media_of(attn, x, media, follows=use_cached_media)
    return _Inputs(parts, k, v, mask_of(attn, x, k, media_locations, use_cached_media))


def _decoded(block: Any, x: Tensor, inputs: _Inputs) -> Tensor | None:  # [B, 1, D]
    """The block's result for one token by one operator, or None where that does not compute it."""
    ff, (attn, k, v, mask) = _feed_forward_of(block.ff, x), inputs
    if ff is None or len(x) != len(k):
        return None
    return decode(x, k, v, mask, attn, ff, (block.attn_gate, block.ff_gate), block.attn.scale)


def _add_attended(
    block: Any,
    inputs: _Inputs | None,
    x: Tensor,  # [B, T, D]
    media: Tensor | MediaCache,
    media_locations: Tensor | None,
    use_cached_media: bool,
) -> Tensor:  # [B, T, D]
    gate = gate_of(block, "attn_gate")
    if inputs is None:
        attended = block.attn(x, media, media_locations, *([True] if use_cached_media else []))
        return add_gated(x, attended, gate)
    parts, k, v, mask = inputs
    z = gated_cross_attention(_fold(x, k), k, v, mask, gate=gate, scale=block.attn.scale, **parts._asdict())
    return z.view(x.shape)


def _is_fused(module: nn.Module) -> bool:
    """Whether it is one of ours, and nobody notices that its parts are computed elsewhere."""
    return isinstance(module, Fused) and is_plain(module, type(module)) and "attend" not in vars(module)


@in_part(ATTENTION)
def mask_of(
    attn: Any,
    x: Tensor,  # [B, T, ...]
    k: Tensor,  # [B, M, R, H, d], or with a divisor of B
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
) -> MediaMask:
    """Which media the text of a module sees. Without locations every row sees every medium."""
    (batch, length), (sequences, num_media) = x.shape[:2], k.shape[:2]
    texts = _texts(x, k)
    if media_locations is None:
        last = torch.full((sequences, texts * length), num_media, device=x.device)
        return MediaMask.from_text_time(last, num_media, immediate=False)
    if not use_cached_media and media_locations.shape[-1] != length:
        raise ValueError(
            f"MaskedCrossAttention: expected media_locations with shape {(batch, length)} to match x, got "
            f"{tuple(media_locations.shape)}. Pass use_cached_media=True if the text follows these locations."
        )
    cached = length if use_cached_media else None
    key = MaskKey(num_media, attn.only_attend_immediate_media, attn.policy, cached, texts)
    return kept_mask(media_locations, key, attn)


def _texts(x: Tensor, k: Tensor) -> int:
    """How many texts in a row share a sequence of media."""
    batch, sequences = len(x), len(k)
    if batch != sequences and (sequences == 0 or batch % sequences):
        raise ValueError(
            f"MaskedCrossAttention: expected media with B={batch} like x, or a MediaCache with a divisor of "
            f"that, got {sequences}."
        )
    return batch // sequences if sequences else 1


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """The texts `[B, T, ...]` that share a sequence of media, one after the other."""
    texts = _texts(x, k)
    return x if texts == 1 else x.reshape(len(k), texts * x.shape[1], *x.shape[2:])


def add_feed_forward(x: Tensor, ff: nn.Module, gate: Tensor | None) -> Tensor:
    """`x + tanh(gate) * ff(x)`, as one sublayer where ff is a plain pre-norm network. None stands for 1."""
    parts = _feed_forward_of(ff, x)
    if parts is not None:
        return gated_feed_forward(x, gate=gate, **parts._asdict())
    return add_gated(x, ff(x), gate)


def gate_of(block: Any, name: str) -> Tensor | None:
    """A gate of a block, or None where `fold` has opened it."""
    return None if name in block.folded else getattr(block, name)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + tanh(gate) * y`; None stands for an open gate."""
    return x + y if gate is None else gated_residual(x, y, gate)


def _feed_forward_of(ff: nn.Module, x: Tensor) -> _plain.FeedForward | None:
    """The parts of a pre-norm network, where they are plain."""
    chain: list[Any] = list(ff) if isinstance(ff, nn.Sequential) and is_plain(ff, nn.Sequential) else []
    return _plain.feed_forward_of(x, *chain) if len(chain) == 4 else None


def resample(
    latents: Tensor,  # [R, D]
    layers: Any,
    x: Tensor,  # [B, M, S, D]
    lengths: Tensor | None,  # [B, M]
) -> Tensor:  # [B, M, R, D]
    """The layers of a resampler, which norm the features once and take all keys and values in one product.

    In the first layer the latents are the same for all media: what is made of them is made once.
    """
    attns, ffs = zip(*(layer.children() for layer in layers), strict=True)
    latents = latents[None, None]  # [1, 1, R, D]
    if not all(map(_is_fused, attns)):
        latents = latents.expand(*x.shape[:2], -1, -1)
        for attn, ff in zip(attns, ffs, strict=True):
            attended = attn(x, latents) if lengths is None else attn(x, latents, lengths)
            latents = add_feed_forward(latents + attended, ff, None)
        return latents
    sources = [Source(attn.to_kv, attn.heads, attn.norm_media) for attn in attns]
    flat = None if lengths is None else lengths.flatten()
    for attn, ff, kv in zip(attns, ffs, keys_and_values(sources, x), strict=True):
        latents = latents + perceive(attn, latents, *kv, flat)
        latents = add_feed_forward(latents, ff, None)
    return latents


def perceive(
    attn: Any,
    latents: Tensor,  # [B, M, R, D], or [1, 1, R, D] for all
    k_media: Tensor,  # [B, M, S, H, d]
    v_media: Tensor,  # [B, M, S, H, d]
    lengths: Tensor | None,  # [B * M]
) -> Tensor:  # [B, M, R, D]
    """Perceiver attention whose features are keys and values already."""
    batch, media = k_media.shape[:2]
    n = attn.norm_latents(latents)
    q = attn.to_q(n).unflatten(-1, (attn.heads, -1))
    k, v = Source(attn.to_kv, attn.heads)(n)
    q, k, v = (each.expand(batch, media, *each.shape[2:]).flatten(0, 1) for each in (q, k, v))
    out = perceiver_attention(
        q, k_media.flatten(0, 1), v_media.flatten(0, 1), k, v, media_lengths=lengths, scale=attn.scale
    )
    return attn.to_out(out.flatten(-2)).unflatten(0, (batch, media))
