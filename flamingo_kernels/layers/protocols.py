"""What the functions of this folder need of a module, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..mask import MediaMask, Policy
from ..media_cache import MediaLayer


class MediaAttention(MediaLayer, Protocol):
    """A masked cross-attention of text to media, with open_flamingo's names.

    Attributes:
        heads: the number of heads H.
        scale: factor on the scores.
        only_attend_immediate_media: whether text sees the last medium only.
        policy: what rows without a medium get, see `MediaMask`.
        adds_locations: whether numbers in `media_locations` are added up; else each but 0 is one medium.
        norm: over the text.
        to_q: the projection to queries.
        to_out: the projection behind the heads.
    """

    heads: int
    scale: float
    only_attend_immediate_media: bool
    adds_locations: bool

    @property
    def policy(self) -> Policy: ...
    @property
    def norm(self) -> nn.Module: ...
    @property
    def to_q(self) -> nn.Module: ...
    @property
    def to_out(self) -> nn.Module: ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        media_locations: Tensor | MediaMask | None,
        use_cached_media: bool,
    ) -> Tensor:
        """The attention itself, between the projections."""

    def mask(self, x: Tensor, k: Tensor, media: Any) -> MediaMask:
        """Which `Media` of keys k the text x sees."""


class GatedBlock(Protocol):
    """A gated cross-attention block with open_flamingo's names.

    Attributes:
        attn: a `MediaAttention`, or what hooks and adapters made of it.
        attn_gate: alpha of its branch.
        ff: the feed-forward network.
        ff_gate: alpha of its branch.
        folded: the values before `fold`, by path.
    """

    folded: Mapping[str, Any]

    @property
    def attn(self) -> nn.Module: ...
    @property
    def attn_gate(self) -> Tensor: ...
    @property
    def ff(self) -> nn.Module: ...
    @property
    def ff_gate(self) -> Tensor: ...
