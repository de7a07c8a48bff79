"""What a decoder keeps of the tokens it has read, with room for those to come."""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


class Growing:
    """A tensor `[..., K, d]` to which tokens are added.

    Its memory grows by a quarter at a time, so that a token costs no copy of those before it. Where autograd
    records each addition makes a new tensor, as a backward pass may need the old one.

    >>> keys = Growing(torch.zeros(1, 2, 3))
    >>> keys.add(torch.ones(1, 1, 3)).shape
    torch.Size([1, 3, 3])
    """

    def __init__(self, seen: Tensor):
        self.seen = seen
        self.memory = seen  # [..., room, d], of which `seen` is the beginning

    def add(self, new: Tensor) -> Tensor:
        """Adds tokens `[..., T, d]` and returns all."""
        length = self.seen.shape[-2]
        longer = length + new.shape[-2]
        if torch.is_grad_enabled() or new.dtype != self.seen.dtype:
            self.seen = self.memory = torch.cat((self.seen, new), dim=-2)
            return self.seen
        read_only = self.memory.is_inference() and not torch.is_inference_mode_enabled()
        if longer > self.memory.shape[-2] or read_only:
            room = longer + longer // 4
            self.memory = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            self.memory[..., :length, :] = self.seen
        self.memory[..., length:longer, :] = new
        self.seen = self.memory[..., :longer, :]
        return self.seen

    def select(self, rows: Tensor) -> None:
        """Makes the texts those of rows `[n]`."""
        self.seen = self.memory = self.seen.index_select(0, rows)

    def repeat(self, count: int) -> None:
        """Makes every text so many, with room for what follows them."""
        length = self.seen.shape[-2]
        batch, *others = self.seen.shape[:-2]
        self.memory = self.seen.new_empty(batch * count, *others, length + length // 4, self.seen.shape[-1])
        self.memory.unflatten(0, (batch, count))[..., :length, :] = self.seen[:, None]
        self.seen = self.memory[..., :length, :]

    def crop(self, tokens: int) -> None:
        """Forgets the last tokens."""
        self.seen = self.seen[..., : self.seen.shape[-2] - tokens, :]


class KVCache:
    """Keys and values of all tokens read so far, with the methods of transformers' caches.

    What `update` returns holds until the cache is cropped and reads other tokens in the place of the last.

    >>> from flamingo import LanguageModel
    >>> language, cache = LanguageModel(vocab_size=10, dim=16, layers=1, heads=2), KVCache()
    >>> _ = language(torch.tensor([[1, 2, 3]]), cache=cache)
    >>> cache.get_seq_length()
    3
    """

    def __init__(self):
        self.layers: list[tuple[Growing, Growing]] = []  # k and v, each [B, H, K, d]
        self.distances: list[Growing] = []  # [H, K, d], with relative positions: of the distances 0 to K - 1

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Adds the keys and values `[B, H, T, d]` of new tokens and returns all of the layer."""
        if layer == len(self.layers):
            self.layers.append((Growing(k), Growing(v)))
            return k, v
        keys, values = self.layers[layer]
        return keys.add(k), values.add(v)

    def update_distances(self, r: Tensor, layer: int) -> Tensor:
        """Adds the keys `[H, n, d]` of longer distances and returns all of the layer."""
        if layer == len(self.distances):
            self.distances.append(Growing(r))
            return r
        return self.distances[layer].add(r)

    def get_seq_length(self) -> int:
        """The number K of tokens."""
        return self.layers[0][0].seen.shape[-2] if self.layers else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes the texts those of the rows beam_idx `[n]`; a row may come again or not at all."""
        for keys, values in self.layers:
            keys.select(beam_idx)
            values.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes every text so many, one after the other."""
        for keys, values in self.layers:
            keys.repeat(repeats)
            values.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last n tokens, given -n."""
        if tokens_to_remove < 0:
            for keys, values in self.layers:
                keys.crop(-tokens_to_remove)
                values.crop(-tokens_to_remove)
            for distances in self.distances:
                distances.crop(-tokens_to_remove)


def growing_cache() -> Any:
    """An empty `DynamicCache` of transformers whose layers grow as `KVCache` does, without a copy a token."""
    cache = import_module("transformers").DynamicCache()
    cache.layer_class_to_replicate = _growing_layer()
    return cache


@lru_cache(maxsize=1)
def _growing_layer() -> type:
    """A layer of transformers' caches, made here as transformers may not be installed."""
    dynamic: Any = import_module("transformers.cache_utils").DynamicLayer

    class GrowingLayer(dynamic):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
            if not self.get_seq_length():
                super().update(key_states, value_states, *args, **options)
            else:
                keys, values = self.growing()
                self.keys, self.values = keys.add(key_states), values.add(value_states)
            return self.keys, self.values

        def crop(self, tokens_to_remove: int) -> None:
            if self.get_seq_length():
                keys, values = self.growing()
                super().crop(tokens_to_remove)
                keys.seen, values.seen = self.keys, self.values  # the beginning of what they were

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.get_seq_length():
                for each in self.growing():
                    each.repeat(repeats)
                self.keys, self.values = (each.seen for each in self.growing_pair)

        def growing(self) -> tuple[Growing, Growing]:
            """The memory of keys and values, begun anew if these were replaced, as by another order."""
            pair = getattr(self, "growing_pair", None)
            if pair is None or pair[0].seen is not self.keys or pair[1].seen is not self.values:
                self.growing_pair = Growing(self.keys), Growing(self.values)
            return self.growing_pair

    return GrowingLayer
