"""The layers of `flamingo`, computed by this library's operators: the same parameters, another forward.

Each class subclasses the module of the same name in `flamingo.modules`, so constructor arguments, parameter
names and `state_dict` are its own by construction. `patch` gives these classes to the modules of a model that
exists already; the functions below them serve its adapters for other libraries too.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flamingo import modules

from . import _dispatch
from .mask import MediaMask, Policy
from .ops import gated_residual, gated_residual_norm, masked_cross_attention, perceiver_attention


class Fused(nn.Module):
    """What every fused layer is an instance of; its repr names the backend.

    Attributes:
        fixes: the known bugs of the module it stands for that it does not repeat, see `patch`.
    """

    fixes: frozenset[str] = frozenset()

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"backend={_dispatch.default_backend}"]))


class MaskedCrossAttention(Fused, modules.MaskedCrossAttention):
    """Text attends to the media that come before it, without a score for any other.

    ::

        to_out(masked_cross_attention(to_q(LN(x)), *to_kv(media), mask))

        text       a  <image>  b  c  <image>  d
        medium 0   .     #     #  #     .     .        # attended, . never computed
        medium 1   .     .     .  .     #     #

    Args: those of `flamingo.modules.MaskedCrossAttention`, also those of `forward`.

    The `MediaMask` is built by the first layer that meets a `media_locations` tensor and kept for the next
    ones, until that tensor is changed in place or another comes: pass all layers the same tensor. A change
    that torch does not count, as one through NumPy, is not seen. A tensor made under `torch.inference_mode`
    counts none, so every layer reads it anew.

    Raises: what `masked_cross_attention` raises. Determinism: as there.

    Source: Flamingo (arXiv 2204.14198), section 2.3.

    Example:
        >>> attn = MaskedCrossAttention(dim=16, dim_visual=8, dim_head=4, heads=2)
        >>> x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 5, 8)
        >>> attn(x, media, torch.tensor([[0, 1, 0, 0, 1, 0]])).shape
        torch.Size([1, 6, 16])
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, media_locations: Tensor | None, use_cached_media: bool
    ) -> Tensor:
        return attend_to_media(
            q,
            k,
            v,
            media_locations,
            use_cached_media,
            immediate=self.only_attend_immediate_media,
            policy=self.policy,
            scale=self.scale,
        )


class GatedCrossAttentionBlock(Fused, modules.GatedCrossAttentionBlock):
    """GATED XATTN-DENSE, with each gate and residual in one pass, the first one together with the next norm.

    ::

        z, n = gated_residual_norm(x, attn(x, media), attn_gate, LN of ff)
        gated_residual(z, rest of ff(n), ff_gate)

    Args: those of `flamingo.modules.GatedCrossAttentionBlock`, also those of `forward`.

    A feed-forward network that is not a plain `Sequential` led by a plain `LayerNorm`, or that has hooks, is
    called as a module. Gates in float32 promote the result as in the reference.

    Raises: what the operators raise. Determinism: theirs.

    Source: Flamingo (arXiv 2204.14198), section 2.2 and figure 4.

    Example:
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
        >>> x, media = torch.randn(1, 3, 16), torch.randn(1, 1, 5, 8)
        >>> torch.equal(block(x, media, torch.tensor([[1, 0, 0]])), x)
        True
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn.__class__ = MaskedCrossAttention

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        attended = self.attn(x, media, media_locations, use_cached_media)
        return add_gated(x, attended, self.attn_gate, self.ff, self.ff_gate)


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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for layer in self.layers:
            attn, _ = cast(nn.ModuleList, layer)
            attn.__class__ = PerceiverAttention


def attend_to_media(
    q: Tensor,  # [B, T, H, d]
    k: Tensor,  # [B, M, R, H, d]
    v: Tensor,  # [B, M, R, H, d]
    media_locations: Tensor | None,  # [B, T]
    use_cached_media: bool,
    *,
    immediate: bool,
    policy: Policy,
    scale: float,
) -> Tensor:  # [B, T, H, d]
    """The core of a masked cross-attention module. Without locations every row sees every medium."""
    length, num_media = q.shape[1], k.shape[1]
    if media_locations is None:
        last = torch.full(q.shape[:2], num_media, device=q.device)
        mask = MediaMask.from_text_time(last, num_media, immediate=False)
    elif use_cached_media:
        mask = _shared_mask(media_locations, _MaskKey(num_media, immediate, policy, length))
    elif media_locations.shape[-1] != length:
        raise ValueError(
            f"MaskedCrossAttention: expected media_locations with shape {tuple(q.shape[:2])} to match x, got "
            f"{tuple(media_locations.shape)}. Pass use_cached_media=True if the text follows these locations."
        )
    else:
        mask = _shared_mask(media_locations, _MaskKey(num_media, immediate, policy, None))
    return masked_cross_attention(q, k, v, mask, scale=scale)


def add_gated(
    x: Tensor,  # [B, T, D]
    attended: Tensor,  # [B, T, D]
    attn_gate: Tensor,  # [1]
    ff: nn.Module,
    ff_gate: Tensor,  # [1]
) -> Tensor:  # [B, T, D]
    """`z + tanh(ff_gate) * ff(z)` with `z = x + tanh(attn_gate) * attended`."""
    split = _norm_and_rest(ff, x.shape[-1])
    if split is None:
        z = gated_residual(x, attended, attn_gate)
        y = ff(z)
    else:
        norm, rest = split
        z, y = gated_residual_norm(x, attended, attn_gate, norm.weight, norm.bias, eps=norm.eps)
        for layer in rest:
            y = layer(y)
    return gated_residual(z, y, ff_gate)


def _norm_and_rest(ff: nn.Module, dim: int) -> tuple[nn.LayerNorm, list[nn.Module]] | None:
    """The LayerNorm that leads a Sequential and the rest, if nobody notices the norm computed elsewhere."""
    chain = list(cast(nn.Sequential, ff)) if _is_plain(ff, nn.Sequential) else []
    if not chain or not _is_plain(chain[0], nn.LayerNorm):
        return None
    norm, rest = cast(nn.LayerNorm, chain[0]), chain[1:]
    return (norm, rest) if norm.normalized_shape == (dim,) and norm.weight is not None else None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else."""
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return type(module).forward is kind.forward and "forward" not in vars(module) and not hooks


class _MaskKey(NamedTuple):
    """What a mask depends on beside the locations; length is None unless the media are cached."""

    num_media: int
    immediate: bool
    policy: Policy
    length: int | None

    def build(self, locations: Tensor) -> MediaMask:
        num_media, immediate, policy, length = self
        if length is not None:
            return MediaMask.cached(locations, num_media, length, immediate=immediate, policy=policy)
        build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
        return build(locations, num_media, policy=policy)


class _KeptMask(NamedTuple):
    locations: weakref.ref[Tensor]
    version: tuple[int, bool]
    key: _MaskKey
    mask: MediaMask


# The last mask: layers of one batch ask for the same. Replaced as a whole, so a thread never sees half of it.
_kept: _KeptMask | None = None


def _shared_mask(locations: Tensor, key: _MaskKey) -> MediaMask:
    global _kept
    if _recording(locations) or locations.is_inference():
        return key.build(locations)
    # A mask made in inference mode cannot be saved for a backward pass.
    version = (locations._version, torch.is_inference_mode_enabled())
    kept = _kept
    if kept is not None and kept.locations() is locations and (kept.version, kept.key) == (version, key):
        return kept.mask
    mask = key.build(locations)
    _kept = _KeptMask(weakref.ref(locations), version, key, mask)
    return mask


def _recording(locations: Tensor) -> bool:
    """Whether what runs now will be replayed with other locations, for which a kept mask would be stale."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return locations.is_cuda and torch.cuda.is_current_stream_capturing()
