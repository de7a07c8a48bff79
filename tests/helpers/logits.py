"""How many tokens have logits at once, seen from within."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Logits(TorchDispatchMode):
    """Of all tensors made in the block whose last dimension is the vocabulary: the most rows that one has.

    Views count not, as a head's transposed weight is one.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in [] if function.is_view else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return out
