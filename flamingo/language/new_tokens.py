"""Tokens that are learnt while the language model around them is frozen."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NewTokens(nn.Module):
    """Rows for a frozen embedding and a frozen head, in parameters of their own.

    ::

        embedding   id 0 ... V-1: the frozen row, unless the id is new   |   new ids: rows that are learnt
        logits      the same, column by column

    Rows added to the frozen matrix itself would make it a parameter that an optimizer decays as a whole.

    Args:
        ids: of the new tokens; those the matrix has no row for continue it: V, V + 1, ...
        embedding: the frozen matrix `[V, D]`; the new rows start random, as large as its own.
        head: the frozen head's matrix `[V, D]`, None where it is the embedding.

    Attributes:
        vocab_size: V and what the new tokens add to it.

    Raises:
        ValueError: if ids repeat, are negative or leave a gap after V.

    Source: arXiv 2204.14198, section A.3.3: `<EOC>` is the only new token, "random-init and learnt" there.

    >>> tokens = NewTokens([10], torch.randn(10, 4))
    >>> tokens(torch.tensor([3, 10]), torch.randn(2, 4)).shape, tokens.vocab_size
    (torch.Size([2, 4]), 11)
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], embedding: Tensor, head: Tensor | None = None):
        super().__init__()
        known = len(embedding)
        beyond = sorted(id for id in ids if id >= known)
        if len(set(ids)) < len(ids) or min(ids) < 0 or beyond != list(range(known, known + len(beyond))):
            raise ValueError(
                f"NewTokens: expected different ids below {known}, the rows of the embedding, or continuing "
                f"them, got {list(ids)}."
            )
        self.known = known
        self.vocab_size = known + len(beyond)
        self.register_buffer("ids", torch.tensor(ids, device=embedding.device), persistent=False)
        self.embedding = _rows_like(embedding, len(ids))
        self.head = None if head is None else _rows_like(head, len(ids))

    def stand_in(self, input_ids: Tensor) -> Tensor:
        """The ids, with 0 where the frozen matrix has no row."""
        return input_ids.masked_fill(input_ids >= self.known, 0)

    def forward(self, x: Tensor, frozen: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """What the frozen matrix makes of ids or of hidden states, and of the new tokens what they make.

        Args:
            x: input_ids `[...]`, or hidden states `[..., D]`.
            frozen: the rows `[..., D]` of the ids that `stand_in` returns, or the logits `[..., V]`.
            scale: see `embed`.

        Returns:
            Rows `[..., D]`, or logits `[..., vocab_size]`.
        """
        return self.add_logits(x, frozen) if x.is_floating_point() else self.embed(x, frozen, scale)

    def embed(self, input_ids: Tensor, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """x `[..., D]`, the frozen rows of input_ids `[...]`, with the new ones, scaled, in their places."""
        is_new = input_ids[..., None] == self.ids  # [..., n]
        new = (self.embedding[is_new.int().argmax(dim=-1)] * scale).to(x.dtype)
        return torch.where(is_new.any(dim=-1, keepdim=True), new, x)

    def add_logits(self, x: Tensor, logits: Tensor) -> Tensor:
        """logits `[..., V]` of x `[..., D]` to `[..., vocab_size]`, those of the new tokens among them."""
        logits = F.pad(logits, (0, self.vocab_size - self.known))
        return logits.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype)).to(logits.dtype))

    @property
    def rows(self) -> nn.Parameter:
        """The rows of the head."""
        return self.embedding if self.head is None else self.head


def _rows_like(matrix: Tensor, rows: int) -> nn.Parameter:
    new = torch.randn(rows, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return nn.Parameter(new * matrix.detach().float().std().to(matrix.dtype))
