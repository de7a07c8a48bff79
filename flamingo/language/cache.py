"""What a decoder keeps of the tokens it has read, with room for those to come."""

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last n tokens, given -n."""
        if tokens_to_remove < 0:
            for keys, values in self.layers:
                keys.crop(-tokens_to_remove)
                values.crop(-tokens_to_remove)
            for distances in self.distances:
                distances.crop(-tokens_to_remove)
