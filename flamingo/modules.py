"""The layers Flamingo adds to a frozen vision encoder and a frozen language model.

Read top to bottom: a feed-forward network, the rule that says which media a text token sees, the gated
cross-attention block that goes in front of language model layers, and the Perceiver Resampler that turns any
number of visual features into a fixed number of latents.

Constructor arguments and parameter names are those of open_flamingo, so its checkpoints load unchanged.
Letters in shape comments: B batch, T text tokens, M media per sequence, R latents per medium, F frames,
H heads, d head dim, D model width, N = B * M resampled media, S = F * spatial positions of one medium.
"""

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

Policy = Literal["zero", "open_flamingo"]


class SquaredReLU(nn.Module):
    """`relu(x) ** 2`, the activation of the paper's new layers (arXiv 2204.14198, Table 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "squared_relu": SquaredReLU, "relu": nn.ReLU}


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward network without biases: `activation(LayerNorm(x) @ W1.T) @ W2.T`.

    Args:
        dim: width D of the input and the output.
        mult: hidden width as a multiple of D (paper: 4).
        activation: "gelu" (exact, erf), "squared_relu" (paper) or "relu".

    Raises:
        ValueError: for an unknown activation.

    >>> FeedForward(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, dim: int, mult: float = 4, activation: str = "gelu"):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"FeedForward: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            )
        hidden = int(dim * mult)
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden, bias=False),
            ACTIVATIONS[activation](),
            nn.Linear(hidden, dim, bias=False),
        )


def text_time(media_locations: Tensor, use_cached_media: bool = False, length: int | None = None) -> Tensor:
    """The 1-based index of the last medium at or before each text token; 0 where there is none.

    ::

        tokens           a  <image>  b  c  <image>  d
        media_locations  0     1     0  0     1     0
        text_time        0     1     1  1     2     2      use_cached_media=False
        text_time        2     2     2  2     2     2      use_cached_media=True

    Args:
        media_locations: `[B, T]` bool or integer; non-zero marks an `<image>` token.
        use_cached_media: every query comes after the whole of `media_locations`, as in decoding; the number
            of queries may then differ from T.
        length: number of queries; defaults to T.

    Returns:
        int64 `[B, length]`.

    Raises:
        ValueError: if `length` differs from T without `use_cached_media`.

    Source: arXiv 2204.14198, section 2.3 (the function phi).

    >>> text_time(torch.tensor([[0, 1, 0, 0, 1, 0]])).tolist()
    [[0, 1, 1, 1, 2, 2]]
    """
    is_media = media_locations != 0
    length = media_locations.shape[1] if length is None else length
    if use_cached_media:
        return is_media.sum(dim=1, keepdim=True).expand(-1, length)
    if length != media_locations.shape[1]:
        raise ValueError(
            f"text_time: expected media_locations with shape (B, {length}) to match the text, got "
            f"{tuple(media_locations.shape)}. Pass use_cached_media=True if the text follows these locations."
        )
    return is_media.cumsum(dim=1)


def dense_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_time: Tensor | None,
    *,
    only_immediate: bool = True,
    policy: Policy = "zero",
    scale: float | None = None,
) -> Tensor:
    """Attention of text over media, the plain way: all scores, a dense mask, a softmax.

    Row t sees medium m (1-based) if `m == text_time[t]`, or `m <= text_time[t]` without `only_immediate`::

                      only_immediate     all preceding
        text_time     m=1 m=2 m=3        m=1 m=2 m=3
        0              .   .   .          .   .   .      policy="zero": zero in both
        1              x   .   .          x   .   .
        2              .   x   .          x   x   .
        4 (> M)        .   .   .          x   x   x      policy="zero": zero if only_immediate

    A row without a visible medium returns exactly 0 and sends no gradient (`policy="zero"`). With
    `policy="open_flamingo"` it averages v over all M * R keys uniformly, as that library does, except the
    `text_time == 0` rows of the `only_immediate` mode, which are zero there as well.

    Scores are computed and stored in the dtype of q. A NaN or infinity in v reaches every row of its
    sequence, seen or not, since what is unseen is multiplied by a zero weight.

    Args:
        q: `[B, T, H, d]`, not yet scaled.
        k, v: `[B, M, R, H, d]`.
        text_time: integer `[B, T]`; None lets every row see every medium.
        only_immediate: see the last medium only, rather than all media up to it.
        policy: what a row without a visible medium returns.
        scale: factor on q; defaults to `d ** -0.5`.

    Returns:
        `[B, T, H, d]` in the dtype of q.

    Raises:
        ValueError: for an unknown policy.

    Source: arXiv 2204.14198, section 2.3.

    >>> q, media = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 5, 2, 8)
    >>> out = dense_masked_attention(q, media, media, torch.tensor([[0, 1, 2, 4]]))
    >>> out.abs().amax(dim=(0, 2, 3)) > 0
    tensor([False,  True,  True, False])
    """
    _check_policy(policy)
    num_media, latents, dim_head = k.shape[1], k.shape[2], k.shape[4]
    k = rearrange(k, "b m r h d -> b (m r) h d")
    v = rearrange(v, "b m r h d -> b (m r) h d")
    scale = dim_head**-0.5 if scale is None else scale

    scores = torch.einsum("b t h d, b s h d -> b h t s", q * scale, k)
    if text_time is None:
        return torch.einsum("b h t s, b s h d -> b t h d", scores.softmax(dim=-1), v)

    media_time = torch.arange(1, num_media + 1, device=q.device).repeat_interleave(latents)  # [M * R]
    now = text_time[:, None, :, None]  # [B, 1, T, 1]
    visible = media_time == now if only_immediate else media_time <= now  # [B, 1, T, M * R]
    weights = scores.masked_fill(~visible, -torch.finfo(scores.dtype).max).softmax(dim=-1)

    # A fully masked row has equal scores, hence uniform weights: blank them unless the policy keeps them.
    if only_immediate and policy == "zero":
        weights = weights.masked_fill((now == 0) | (now > num_media), 0.0)
    elif only_immediate or policy == "zero":
        weights = weights.masked_fill(now == 0, 0.0)
    return torch.einsum("b h t s, b s h d -> b t h d", weights, v)


class MaskedCrossAttention(nn.Module):
    """Text attends to the media that come before it: `to_out(attention(to_q(LN(x)), to_kv(media), mask))`.

    Args:
        dim: width D of the text.
        dim_visual: width of the media.
        dim_head: width d of one head.
        heads: number of heads H.
        only_attend_immediate_media: a token sees the last medium before it (paper), not all of them.
        norm_media: one LayerNorm on the media for keys and values (the paper's first version has it, its
            reproductions do not).
        policy: what a row without a visible medium gets, "zero" or "open_flamingo"; drawn in
            `dense_masked_attention`.

    A subclass that computes the attention differently overrides `attend`.

    Source: arXiv 2204.14198, section 2.3.

    >>> attn = MaskedCrossAttention(dim=16, dim_visual=8, dim_head=4, heads=2)
    >>> x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 5, 8)
    >>> attn(x, media, torch.tensor([[0, 1, 0, 0, 1, 0]])).shape
    torch.Size([1, 6, 16])
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
        norm_media: bool = False,
        policy: Policy = "zero",
    ):
        super().__init__()
        _check_policy(policy)
        self.scale = dim_head**-0.5
        self.heads = heads
        self.only_attend_immediate_media = only_attend_immediate_media
        self.policy: Policy = policy
        inner = dim_head * heads

        self.norm = nn.LayerNorm(dim)
        self.norm_media = nn.LayerNorm(dim_visual) if norm_media else nn.Identity()
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """
        Args:
            x: `[B, T, D]`.
            media: `[B, M, R, dim_visual]`.
            media_locations: `[B, T]` bool or integer, non-zero at `<image>` tokens; None lets every token see
                every medium, whatever `use_cached_media` says.
            use_cached_media: all of x comes after `media_locations`, whose length may then differ from T.

        Returns:
            `[B, T, D]`.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        check_cross_attention_inputs(x, media, media_locations)
        q = rearrange(self.to_q(self.norm(x)), "b t (h d) -> b t h d", h=self.heads)
        kv = self.to_kv(self.norm_media(media)).chunk(2, dim=-1)
        k, v = (rearrange(t, "b m r (h d) -> b m r h d", h=self.heads) for t in kv)
        out = self.attend(q, k, v, media_locations, use_cached_media)  # [B, T, H, d]
        return self.to_out(rearrange(out, "b t h d -> b t (h d)"))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, media_locations: Tensor | None, use_cached_media: bool
    ) -> Tensor:
        """The attention core: q `[B, T, H, d]`, k and v `[B, M, R, H, d]` to `[B, T, H, d]`."""
        times = None
        if media_locations is not None:
            times = text_time(media_locations, use_cached_media, length=q.shape[1])
        return dense_masked_attention(
            q,
            k,
            v,
            times,
            only_immediate=self.only_attend_immediate_media,
            policy=self.policy,
            scale=self.scale,
        )


class GatedCrossAttentionBlock(nn.Module):
    """GATED XATTN-DENSE, the layer put in front of a frozen language model block.

    ::

        x = x + tanh(attn_gate) * attn(x, media)
        x = x + tanh(ff_gate) * ff(x)

    Both gates start at 0, so the block starts as the identity. A gate kept in float32 beside bfloat16
    activations promotes the result to float32, as torch's type promotion does for any product.

    Args:
        dim, dim_visual, dim_head, heads, only_attend_immediate_media, norm_media, policy: see
            `MaskedCrossAttention`.
        ff_mult, activation: see `FeedForward`.

    Source: arXiv 2204.14198, section 2.2 and Figure 4.

    >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
    >>> x, media = torch.randn(1, 3, 16), torch.randn(1, 1, 5, 8)
    >>> torch.equal(block(x, media, torch.tensor([[1, 0, 0]])), x)
    True
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        only_attend_immediate_media: bool = True,
        activation: str = "gelu",
        norm_media: bool = False,
        policy: Policy = "zero",
    ):
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            only_attend_immediate_media=only_attend_immediate_media,
            norm_media=norm_media,
            policy=policy,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = FeedForward(dim, mult=ff_mult, activation=activation)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """x `[B, T, D]`, media `[B, M, R, dim_visual]` to `[B, T, D]`; see `MaskedCrossAttention.forward`."""
        x = x + self.attn_gate.tanh() * self.attn(x, media, media_locations, use_cached_media)
        return x + self.ff_gate.tanh() * self.ff(x)


class PerceiverAttention(nn.Module):
    """Latents attend to the features of their medium and to themselves.

    ::

        to_out(attention(q = to_q(LN(latents)), keys and values = to_kv([LN(x) ; LN(latents)])))

    Args:
        dim: width D of features and latents.
        dim_head: width d of one head.
        heads: number of heads H.

    A subclass that computes the attention differently overrides `attend`.

    Source: arXiv 2204.14198, appendix A.1.1 and Figure 5.

    >>> attn = PerceiverAttention(dim=16, dim_head=4, heads=2)
    >>> attn(torch.randn(2, 1, 9, 16), torch.randn(2, 1, 4, 16)).shape
    torch.Size([2, 1, 4, 16])
    """

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        inner = dim_head * heads

        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor, media_lengths: Tensor | None = None) -> Tensor:
        """
        Args:
            x: `[B, M, S, D]` features of each medium.
            latents: `[B, M, R, D]`.
            media_lengths: integer `[B, M]`, how many of the S features count; None for all.

        Returns:
            `[B, M, R, D]`.
        """
        batch, num_media = latents.shape[:2]
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = rearrange(self.to_q(latents), "b m r (h d) -> (b m) r h d", h=self.heads)
        k_media, v_media = self._keys_and_values(x)
        k_latents, v_latents = self._keys_and_values(latents)
        lengths = None if media_lengths is None else media_lengths.flatten()
        out = self.attend(q, k_media, v_media, k_latents, v_latents, lengths)  # [N, R, H, d]
        return self.to_out(rearrange(out, "(b m) r h d -> b m r (h d)", b=batch, m=num_media))

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.to_kv(x).chunk(2, dim=-1)
        k, v = (rearrange(t, "b m n (h d) -> (b m) n h d", h=self.heads) for t in kv)
        return k, v

    def attend(
        self,
        q: Tensor,
        k_media: Tensor,
        v_media: Tensor,
        k_latents: Tensor,
        v_latents: Tensor,
        media_lengths: Tensor | None = None,
    ) -> Tensor:
        """The attention core over the keys `[media ; latents]`.

        q, k_latents, v_latents `[N, R, H, d]`; k_media, v_media `[N, S, H, d]`; media_lengths `[N]` integers,
        how many media keys count; to `[N, R, H, d]`.
        """
        k = torch.cat((k_media, k_latents), dim=1)  # [N, S + R, H, d]
        v = torch.cat((v_media, v_latents), dim=1)
        scores = torch.einsum("n r h d, n s h d -> n h r s", q * self.scale, k)
        if media_lengths is not None:
            position = torch.arange(k.shape[1], device=k.device)
            padding = (position >= media_lengths[:, None]) & (position < k_media.shape[1])  # [N, S + R]
            scores = scores.masked_fill(padding[:, None, None], -torch.finfo(scores.dtype).max)
        return torch.einsum("n h r s, n s h d -> n r h d", scores.softmax(dim=-1), v)


def interpolate_time(embs: Tensor, frames: int | Tensor, length: int | None = None) -> Tensor:
    """One embedding a frame, linearly interpolated where there are more frames than learned embeddings.

    With K embeddings, frame i of `frames > K` sits at position `(K - 1) * i / (frames - 1)`: the first and
    the last embedding are kept exactly. The paper trains with 8 frames and uses 30, without giving this rule.
    Up to K frames take the first `frames` embeddings.

    Args:
        embs: `[K, D]`.
        frames: number of frames, or an integer tensor `[...]` of the lengths of clips padded to `length`.
        length: number of rows returned; defaults to `frames`, required where that is a tensor.

    Returns:
        `[length, D]`, or `[..., length, D]` for a tensor of frames. Rows past a clip's end are unspecified.

    Raises:
        ValueError: for a tensor of frames without `length`.

    Source: arXiv 2204.14198, appendix B.1.2.

    >>> interpolate_time(torch.tensor([[0.0], [10.0]]), 5).flatten().tolist()
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    last = len(embs) - 1
    shortest = max(last + 1, 2)  # up to K frames step from one embedding to the next
    span: int | Tensor
    if isinstance(frames, int):
        length = frames if length is None else length
        span = max(frames, shortest) - 1
    elif length is None:
        raise ValueError("interpolate_time: expected a length beside a tensor of frames, got None.")
    else:
        span = frames[..., None].clamp(min=shortest) - 1  # [..., 1]
    # Integer arithmetic keeps the end points exact: position = step // span + (step % span) / span.
    step = torch.arange(length, device=embs.device) * last
    before = (step // span).clamp(max=last)
    after = (before + 1).clamp(max=last)
    weight = (step % span / span).to(embs.dtype)
    return torch.lerp(embs[before], embs[after], weight[..., None])


class PerceiverResampler(nn.Module):
    """Any number of visual features of a medium to a fixed number of latents.

    ::

        x = flatten(x + time_embs)
        latents = learned                              the same R vectors for every medium
        repeat depth times:
            latents = latents + attn(x, latents)
            latents = latents + ff(latents)
        return LN(latents)

    Args:
        dim: width D of the latents.
        depth: number of layers.
        dim_head, heads: see `PerceiverAttention`.
        num_latents: number R of latents of one medium.
        max_num_media: number of learned medium embeddings, None for none (the paper has none).
        max_num_frames: number of learned frame embeddings, None for none; more frames interpolate them.
        ff_mult, activation: see `FeedForward`.
        dim_input: width of the features where it is not D (paper: 3072 projected to 1536).

    Source: arXiv 2204.14198, section 2.1 and Figure 5. The final LayerNorm is open_flamingo's.

    >>> resampler = PerceiverResampler(dim=16, depth=1, dim_head=4, heads=2, num_latents=5)
    >>> resampler(torch.randn(2, 3, 1, 9, 16)).shape
    torch.Size([2, 3, 5, 16])
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: float = 4,
        activation: str = "gelu",
        dim_input: int | None = None,
    ):
        super().__init__()
        self.project_input = nn.Identity() if dim_input is None else nn.Linear(dim_input, dim, bias=False)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads),
                    FeedForward(dim, mult=ff_mult, activation=activation),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """
        Args:
            x: `[B, M, F, v, dim_input or D]`: v features of each of F frames (an image is one frame).
            num_frames: integer `[B, M]`, the true number of frames of clips padded to F; None if all have F.

        Returns:
            `[B, M, R, D]`.

        Raises:
            ValueError: if x or num_frames has another shape, or there are more than `max_num_media` media.
        """
        if x.ndim != 5:
            raise ValueError(
                f"PerceiverResampler: expected x with shape (B, M, F, v, D), got {tuple(x.shape)}. "
                "Images are clips of one frame."
            )
        batch, num_media, frames, positions = x.shape[:4]
        if num_frames is not None and num_frames.shape != (batch, num_media):
            raise ValueError(
                f"PerceiverResampler: expected num_frames with shape ({batch}, {num_media}) to match x, got "
                f"{tuple(num_frames.shape)}."
            )
        x = self.project_input(x)
        if self.frame_embs is not None:
            # [F, D], or [B, M, F, D] where clips differ in length
            embs = interpolate_time(self.frame_embs, frames if num_frames is None else num_frames, frames)
            x = x + embs[..., None, :]
        x = rearrange(x, "b m f v d -> b m (f v) d")
        if self.media_time_embs is not None:
            if num_media > len(self.media_time_embs):
                raise ValueError(
                    f"PerceiverResampler: expected at most max_num_media={len(self.media_time_embs)} media, "
                    f"got {num_media}."
                )
            x = x + self.media_time_embs[:num_media]

        lengths = None if num_frames is None else num_frames * positions
        return self.norm(self.resample(x, lengths))

    def resample(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The layers: features `[B, M, S, D]`, as many of a medium as lengths `[B, M]`, to `[B, M, R, D]`."""
        latents = repeat(self.latents, "r d -> b m r d", b=x.shape[0], m=x.shape[1])
        for layer in self.layers:
            attn, ff = layer.children()
            latents = latents + attn(x, latents, lengths)
            latents = latents + ff(latents)
        return latents


def _check_policy(policy: str) -> None:
    if policy not in ("zero", "open_flamingo"):
        raise ValueError(
            f"masked cross-attention: expected policy 'zero' or 'open_flamingo', got {policy!r}."
        )


def check_cross_attention_inputs(x: Tensor, media: Tensor, media_locations: Tensor | None) -> None:
    if x.ndim != 3 or media.ndim != 4 or len(media) != len(x):
        raise ValueError(
            "MaskedCrossAttention: expected x (B, T, D) and media (B, M, R, dim_visual) with the same B, got "
            f"{tuple(x.shape)} and {tuple(media.shape)}."
        )
    if media_locations is not None and (media_locations.ndim != 2 or len(media_locations) != len(x)):
        raise ValueError(
            f"MaskedCrossAttention: expected media_locations with shape ({len(x)}, T), got "
            f"{tuple(media_locations.shape)}."
        )
