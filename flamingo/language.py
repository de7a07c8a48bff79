"""A small decoder language model: tokens to logits, each token seeing itself and those before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.transformer import TransformerLayer, rotary_angles


class LanguageModel(nn.Module):
    """A decoder in four steps, which Flamingo also takes one by one to slip its own blocks in between.

    Args:
        vocab_size: number of tokens.
        dim: width D.
        layers, heads: of the transformer.
        tie_embeddings: whether the output head is the token embedding.

    >>> LanguageModel(vocab_size=10, dim=16, layers=1, heads=2)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(self, *, vocab_size: int, dim: int, layers: int, heads: int, tie_embeddings: bool = True):
        super().__init__()
        self.dim_head = dim // heads
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids `[B, T]`, attention_mask `[B, T]` (0 at padding) to logits `[B, T, vocab_size]`."""
        x = self.embedding(input_ids)
        angles, mask = self.positions_and_mask(input_ids, attention_mask)
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.logits(x)

    def positions_and_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotary angles `[T, d / 2]` and the bool mask `[B, 1, T, T]`, None where nothing is padded."""
        length, device = input_ids.shape[1], input_ids.device
        angles = rotary_angles(length, self.dim_head, device)
        if attention_mask is None:
            return angles, None
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"LanguageModel: expected attention_mask with shape {tuple(input_ids.shape)} like input_ids, "
                f"got {tuple(attention_mask.shape)}."
            )
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself: no row is empty
        return angles, causal & (attention_mask[:, None, None, :] != 0) | itself

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `[B, T, D]` to logits `[B, T, vocab_size]`."""
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
