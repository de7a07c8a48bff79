"""What a decoder keeps of the tokens it has read."""

from __future__ import annotations

import copy

import pytest
import torch

from flamingo.language.cache import Growing, KVCache, growing_cache


def tokens(count: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # [B, H, T, d]
    return torch.randn(batch, 3, count, 4, dtype=dtype)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_all_that_was_added_is_there_in_order(mode):
    pieces = [tokens(count) for count in (5, 1, 1, 7, 1, 30, 1)]
    with mode():
        growing = Growing(pieces[0])
        for piece in pieces[1:]:
            found = growing.add(piece)
    torch.testing.assert_close(found, torch.cat(pieces, dim=-2), rtol=0, atol=0)


@torch.no_grad()
def test_a_token_copies_none_of_those_before_it():
    growing = Growing(tokens(100))
    places = {growing.add(tokens(1)).data_ptr() for _ in range(100)}
    assert len(places) <= 5  # 101, 127, 160, 201


@torch.no_grad()
def test_what_was_first_given_is_never_written_to():
    wider = tokens(8)
    first, kept = wider[:, :, :5], wider.clone()
    growing = Growing(first)
    growing.add(tokens(1))
    torch.testing.assert_close(wider, kept, rtol=0, atol=0)


@torch.no_grad()
def test_a_token_takes_the_place_of_one_that_was_forgotten():
    growing, wrong, right = Growing(tokens(5)), tokens(1), tokens(1)
    place = growing.add(wrong).data_ptr()
    growing.crop(1)
    found = growing.add(right)
    assert found.data_ptr() == place
    torch.testing.assert_close(found[..., -1:, :], right, rtol=0, atol=0)


def test_a_backward_pass_finds_what_it_needs():
    """The queries alone are trained: what they met is needed after another token was read."""
    growing, q, out, met = Growing(tokens(3)), tokens(1).requires_grad_(), [], []
    for _ in range(3):
        keys = growing.add(tokens(1))
        out.append((q * keys).sum())
        met.append(keys.sum(dim=-2, keepdim=True))
        growing.crop(1)
    sum(out).backward()
    torch.testing.assert_close(q.grad, sum(met))


@torch.no_grad()
def test_another_dtype_is_promoted():
    growing = Growing(tokens(3, dtype=torch.bfloat16))
    growing.add(tokens(1, dtype=torch.bfloat16))  # now there is room for more
    growing.crop(1)
    new = tokens(1)
    found = growing.add(new)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[..., -1:, :], new, rtol=0, atol=0)


def test_what_inference_mode_has_read_is_read_on_without_it():
    with torch.inference_mode():
        growing = Growing(tokens(3))
        before = growing.add(tokens(1)).clone()
        growing.crop(1)
    new = tokens(1)
    with torch.no_grad():
        found = growing.add(new)
    torch.testing.assert_close(found, torch.cat((before[..., :3, :], new), dim=-2), rtol=0, atol=0)


@torch.no_grad()
def test_other_rows():
    cache, (k, v) = KVCache(), (tokens(5, batch=3), tokens(5, batch=3))
    cache.update(k, v, layer=0)
    rows = torch.tensor([2, 0, 2, 1])
    cache.reorder_cache(rows)
    more = tokens(1, batch=4), tokens(1, batch=4)
    for found, old, new in zip(cache.update(*more, layer=0), (k, v), more, strict=True):
        torch.testing.assert_close(found, torch.cat((old[rows], new), dim=-2), rtol=0, atol=0)


class TestOfTransformers:
    """`growing_cache` against a `DynamicCache`, through all that a context does with it."""

    @pytest.fixture
    def both(self):
        transformers = pytest.importorskip("transformers")
        return growing_cache(), transformers.DynamicCache()

    def add(self, caches, count, batch):
        k, v = tokens(count, batch=batch), tokens(count, batch=batch)
        found, expected = (cache.update(k, v, 0) for cache in caches)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    def test_holds_the_same(self, both):
        self.add(both, 5, batch=2)
        for count in (1, 1, 3, 1):
            self.add(both, count, batch=2)
        for cache in both:
            cache.crop(-4)
        self.add(both, 2, batch=2)
        for cache in both:
            cache.reorder_cache(torch.tensor([1, 0, 1]))
        self.add(both, 1, batch=3)
        for cache in both:
            cache.crop(-2)
            cache.batch_repeat_interleave(2)
        self.add(both, 1, batch=6)
        copies = [copy.deepcopy(cache) for cache in both]
        self.add(copies, 1, batch=6)
        self.add(both, 2, batch=6)
        assert copies[0].get_seq_length() == copies[1].get_seq_length() == both[0].get_seq_length() - 1

    @torch.no_grad()
    def test_a_token_costs_no_copy(self, both):
        cache, _ = both
        cache.update(tokens(40), tokens(40), 0)
        places = {cache.update(tokens(1), tokens(1), 0)[0].data_ptr() for _ in range(8)}
        cache.crop(-5)
        places.add(cache.update(tokens(2), tokens(2), 0)[0].data_ptr())
        assert len(places) == 1
