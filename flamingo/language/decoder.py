"""A decoder language model: tokens to logits, each token seeing itself and those before it.

The paper's is Chinchilla: RMSNorm before every sublayer, GELU, no biases, and the relative positions of
Transformer-XL. Rotary positions cost no parameter and are the default.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.language.cache import KVCache
from flamingo.language.loss import is_plain_linear, is_watched, sum_of_losses, sum_of_losses_in_pieces
from flamingo.language.new_tokens import NewTokens
from flamingo.language.positions import Places, positions_of, rotary_angles, rotate, sinusoids
from flamingo.self_attention import SelfAttention

PositionKind = Literal["rotary", "relative"]


class CausalSelfAttention(SelfAttention):
    """Each token sees itself and those before it, with rotary positions."""

    def forward(self, x: Tensor, places: Places, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x `[B, T, D]`, new tokens of texts whose earlier ones the cache holds, to `[B, T, D]`."""
        q, k, v = self.split(x)
        if places.angles is not None:
            q, k = rotate(q, places.angles), rotate(k, places.angles)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        return self.merge(self.attend(q, k, v, places, cache, layer))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, cache: KVCache | None, layer: int
    ) -> Tensor:
        """q `[B, H, T, d]` over k and v `[B, H, K, d]` to `[B, H, T, d]`."""
        causal = places.visible is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=places.visible, is_causal=causal)


class RelativeSelfAttention(CausalSelfAttention):
    """The same, with the relative positions of Transformer-XL.

    ::

        score[i, j] = ((q[i] + content_bias) . k[j] + (q[i] + distance_bias) . r[i - j]) / sqrt(d)
        r[n] = to_distance(sinusoid(n))

    Source: Dai et al. 2019 (arXiv 1901.02860), section 3.3.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.to_distance = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, dim // heads))  # u of the paper
        self.distance_bias = nn.Parameter(torch.zeros(heads, 1, dim // heads))  # v of the paper

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, cache: KVCache | None, layer: int
    ) -> Tensor:
        assert places.distance is not None  # LanguageModel.places
        assert places.longer is not None
        r = rearrange(self.to_distance(places.longer.to(q.dtype)), "n (h d) -> h n d", h=self.heads)
        if cache is not None:
            r = cache.update_distances(r, layer)
        by_distance = (q + self.distance_bias) @ r.mT * q.shape[-1] ** -0.5  # [B, H, T, n]
        batch, heads, length, _ = by_distance.shape
        bias = by_distance.gather(-1, places.distance.expand(batch, heads, length, -1))
        if places.visible is not None:
            bias = bias.masked_fill(~places.visible, -torch.inf)
        return F.scaled_dot_product_attention(q + self.content_bias, k, v, attn_mask=bias)


class DecoderLayer(nn.Module):
    """`x + attn(RMSNorm(x))`, then `x + ff(x)`."""

    def __init__(self, dim: int, heads: int, positions: PositionKind = "rotary"):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        attention = CausalSelfAttention if positions == "rotary" else RelativeSelfAttention
        self.attn = attention(dim, heads)
        self.ff = nn.Sequential(
            nn.RMSNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, x: Tensor, places: Places, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`; layer is its place in the cache."""
        x = x + self.attn(self.norm(x), places, cache, layer)
        return x + self.ff(x)


class Embedding(nn.Embedding):
    """Rows of ids, and as a head that is tied to them the logits of hidden states.

    The matrix is read in a call of its module alone, where what moves weights in and out can follow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: ids `[...]` to `[..., D]`, or hidden states `[..., D]` to logits `[..., V]`."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class LanguageModel(nn.Module):
    """A decoder in the manner of Chinchilla: `head(RMSNorm(layers(embedding(input_ids))))`.

    Args:
        vocab_size: number of tokens.
        dim: width D.
        layers, heads: of the decoder; the feed-forward networks are 4 D wide.
        positions: "rotary", or "relative" for Transformer-XL's, as the paper's language models have.
        tie_embeddings: whether the output head is the token embedding.
        new_tokens: ids whose embedding `freeze` leaves trainable, see `NewTokens`.

    Attributes:
        dim, vocab_size, num_layers: the sizes.

    Raises:
        ValueError: for other positions, or a width that heads do not divide into pairs.

    Limits: 13 D^2 parameters a layer with relative positions, 12 D^2 with rotary ones.

    Source: arXiv 2203.15556 (Chinchilla), with the architecture of arXiv 2112.11446 (Gopher); positions of
    arXiv 1901.02860 and arXiv 2104.09864.

    >>> language = LanguageModel(vocab_size=10, dim=16, layers=1, heads=2)
    >>> language(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        layers: int,
        heads: int,
        positions: PositionKind = "rotary",
        tie_embeddings: bool = True,
        new_tokens: Sequence[int] = (),
    ):
        super().__init__()
        if positions not in ("rotary", "relative"):
            raise ValueError(f"LanguageModel: expected positions 'rotary' or 'relative', got {positions!r}.")
        if dim % (2 * heads):
            raise ValueError(f"LanguageModel: expected dim to be an even multiple of {heads=}, got {dim}.")
        self.dim = dim
        self.dim_head = dim // heads
        self.positions = positions
        self.embedding = Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, positions) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)
        self._initialise()
        head = None if self.head is None else self.head.weight
        self.new_tokens = NewTokens(new_tokens, self.embedding.weight, head) if new_tokens else None

    def _initialise(self) -> None:
        """Products keep the size of their inputs, and all that layers add is as large as the embedding."""
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                added = name.endswith(("attn.to_out", "ff.3"))
                terms = module.in_features * (2 * self.num_layers if added else 1)
                nn.init.normal_(module.weight, std=terms**-0.5)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        return self.new_tokens.vocab_size if self.new_tokens else self.embedding.num_embeddings

    def new_cache(self) -> KVCache:
        """An empty cache; given to every call on one text, it spares reading earlier tokens again."""
        return KVCache()

    def freeze(self) -> "LanguageModel":
        """Freezes all parameters but those of new tokens; returns the model."""
        self.requires_grad_(False)
        if self.new_tokens:
            self.new_tokens.requires_grad_(True)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        before_layer: Callable[[int, Tensor], Tensor] | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """
        Args:
            input_ids: int64 `[B, T]`, new tokens.
            attention_mask: `[B, K]`, 0 at padding, of the tokens in the cache and the new ones: a token's
                position is the number of those before it. None for no padding.
            cache: keys and values of the K - T tokens before; those of the new tokens are added.
            before_layer: what to make of the input x `[B, T, D]` of a layer, from its index and x.
            logits_to_keep: n, to compute the logits of the last n tokens alone; 0 for all T.

        Returns:
            logits `[B, T or n, vocab_size]`.

        Raises:
            ValueError: if attention_mask has another shape.
        """
        x = self.hidden_states(input_ids, attention_mask, cache, before_layer)
        return self.logits(x[:, -logits_to_keep:])

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        before_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The sum of the losses of the next token, float32 or wider.

        The logits of all tokens never exist at once, unless somebody may see or change them: a subclass, a
        hook on the model or its head, a head of another kind.

        Args:
            labels: int64 `[B, T]`, the tokens again, -100 where one is not to be learned.
            input_ids, attention_mask, before_layer: see `forward`.
        """
        head = self.head
        is_plain = _is_plain(self.embedding) if head is None else is_plain_linear(head)
        if not is_plain or type(self) is not LanguageModel or is_watched(self):
            return sum_of_losses(self(input_ids, attention_mask, before_layer=before_layer), labels)
        x = self.norm(self.hidden_states(input_ids, attention_mask, None, before_layer))
        parameters = [self.embedding.weight] if head is None else [*head.parameters()]
        if self.new_tokens is not None:
            parameters.append(self.new_tokens.rows)
        return sum_of_losses_in_pieces(
            self._project, x, labels, vocab_size=self.vocab_size, parameters=parameters
        )

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        before_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What the last layer returns, `[B, T, D]`; see `forward`."""
        x = self.embed(input_ids)
        places = self.places(input_ids, attention_mask, cache)
        for i, layer in enumerate(self.layers):
            if before_layer is not None:
                x = before_layer(i, x)
            x = layer(x, places, cache, i)
        return x

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids `[B, T]` to `[B, T, D]`."""
        if self.new_tokens is None:
            return self.embedding(input_ids)
        return self.new_tokens(input_ids, self.embedding(self.new_tokens.stand_in(input_ids)))

    def places(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Places:
        """Positions of the new tokens `[B, T]`, and what each sees."""
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        device = input_ids.device
        keys = torch.arange(past + length, device=device)[None]  # [1, K]
        visible = None
        if attention_mask is not None:
            check_attention_mask(attention_mask, (batch, past + length))
            # Padding sees itself: no row is empty.
            itself = keys == keys[:, past:, None]
            visible = (attention_mask[:, None, :] != 0) & (keys <= keys[:, past:, None]) | itself
            keys = positions_of(attention_mask)
        elif past:
            visible = keys <= keys[:, past:, None]
        new = keys[:, past:]
        if self.positions == "rotary":
            angles = rotary_angles(new, self.dim_head)[:, None]
            return Places(None if visible is None else visible[:, None], angles)
        if visible is None:
            visible = keys <= new[..., None]
        longer = sinusoids(torch.arange(past, past + length, device=device), self.dim)
        distance = (new[..., None] - keys[:, None]).clamp(min=0)
        return Places(visible[:, None], None, distance[:, None], longer)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `[B, T, D]` to logits `[B, T, vocab_size]`."""
        return self._project(self.norm(x))

    def _project(self, x: Tensor) -> Tensor:
        logits = self.embedding(x) if self.head is None else self.head(x)
        return logits if self.new_tokens is None else self.new_tokens(x, logits)


def _is_plain(embedding: nn.Module) -> bool:
    return type(embedding) is Embedding and not is_watched(embedding)


def check_attention_mask(attention_mask: Tensor, expected: tuple[int, int]) -> None:
    if attention_mask.shape != expected:
        raise ValueError(
            f"language model: expected attention_mask with shape {expected}, that of the tokens in the cache "
            f"and of input_ids, got {tuple(attention_mask.shape)}."
        )
