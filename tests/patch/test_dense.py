"""Dense masks as spans, without the libraries that make them."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.patch import dense

LOWEST = torch.finfo(torch.float32).min


def added(visible: torch.Tensor) -> torch.Tensor:
    """A bool mask `[B, T, S]` as it is added to scores, `[B, 1, T, S]`."""
    return torch.where(visible, 0.0, LOWEST)[:, None]


def keys(*rows: str) -> torch.Tensor:
    """A bool mask of one sequence, drawn with # for what a row sees."""
    return torch.tensor([[[key == "#" for key in row] for row in rows]])


def seen(spans: dense.KeySpans, count: int) -> torch.Tensor:
    """The mask that spans stand for, in the original order of the keys."""
    mask = spans.mask.dense(count // spans.mask.num_media)[:, 0]
    if spans.order is None:
        return mask
    return torch.zeros_like(mask).scatter(-1, spans.order[:, None].expand_as(mask), mask)


class TestKeySpans:
    @pytest.mark.parametrize("as_given", [added, lambda visible: visible[:, None]], ids=["added", "bool"])
    @pytest.mark.parametrize(
        "rows",
        [
            ("##....", "..##..", "..####"),
            ("######", "......", "####.."),
            ("##..##", "......", "######"),  # a gap that nobody sees through, except who sees all
        ],
    )
    def test_says_what_the_mask_says(self, as_given, rows):
        visible = keys(*rows)
        some = visible.any(-1)
        spans = dense.key_spans(as_given(visible), some)
        assert torch.equal(seen(spans, 6), visible)
        assert (spans.order is not None) == (rows[0] == "##..##")

    def test_keys_and_values_follow_the_order(self):
        visible = keys("##..##", "######")
        spans = dense.key_spans(added(visible))
        kv = torch.randn(1, 6, 2, 3)
        media = spans.media(kv)
        assert media.shape == (1, spans.mask.num_media, 6 // spans.mask.num_media, 2, 3)
        lo, hi = spans.mask.lo[0, 0], spans.mask.hi[0, 0]
        assert torch.equal(media[0, lo:hi].flatten(0, 1), kv[0, visible[0, 0]])

    @pytest.mark.parametrize(
        ("mask", "rows"),
        [
            (added(keys("#.#.", ".##.", "...#")), None),  # a gap
            (added(keys("##..", "....")), None),  # a row that sees nothing, though it may
            (torch.tensor([0.0, -1.0])[None, None, None], None),  # a bias
            (added(keys("##.."))[:, 0], None),
            (added(keys("##..")).expand(1, 2, 1, 4), None),  # another mask for every head
            (added(torch.ones(1, 1, 1601 * 2).bool() & (torch.arange(1601 * 2) < 1601)), None),  # a prime
        ],
        ids=["gap", "blind row", "bias", "no heads", "two heads", "1601 tokens"],
    )
    def test_what_is_left_to_a_dense_attention(self, mask, rows):
        assert dense.key_spans(mask, rows) is None

    def test_rows_that_average(self):
        rows = torch.tensor([[1, 1, 0]])
        spans = dense.key_spans(added(keys("##..", "....", "....")), rows, averages=True)
        assert spans.mask.averages().tolist() == [[False, True, False]]

    def test_is_read_once_and_again_when_it_changed(self, monkeypatch):
        reads = []
        read = dense._read_spans
        monkeypatch.setattr(dense, "_read_spans", lambda *args: reads.append(1) or read(*args))
        mask, rows = added(keys("##..", "..##")), torch.ones(1, 2)
        first = dense.key_spans(mask, rows)
        assert dense.key_spans(mask, rows) is first
        assert dense.key_spans(mask) is not first
        mask[0, 0, 0, 2:] = 0
        assert torch.equal(seen(dense.key_spans(mask), 4), keys("####", "..##"))
        dense.key_spans(mask.clone())
        assert len(reads) == 4
        with torch.inference_mode():
            inferred = mask.clone()
            dense.key_spans(inferred)
            inferred[0, 0, 0, 2:] = LOWEST
            assert torch.equal(seen(dense.key_spans(inferred), 4), keys("##..", "..##"))

    def test_is_not_read_while_traced(self):
        found = []

        def look(mask):
            found.append(dense.key_spans(mask))
            return mask + 1

        torch.compile(look, backend="eager", fullgraph=True)(added(keys("##..")))
        assert found == [None]


class TestMediaFirst:
    @pytest.mark.parametrize("as_given", ["added", "padding"])
    def test_moves_what_is_seen_to_the_front(self, as_given):
        media = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        padding = torch.cat([media, torch.ones(3, 2, dtype=torch.long)], dim=1)
        mask = added(padding.bool()[:, None].expand(-1, 2, -1)) if as_given == "added" else padding
        order, lengths = dense.media_first(mask, 2)
        assert dense.media_first(mask[1:], 2)[0] is None
        assert order.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert lengths.tolist() == [2, 4, 0]

    @pytest.mark.parametrize(
        "mask",
        [
            added(keys("#.##", "####")),  # rows that differ
            added(keys("####", "####"))[:, 0],
            torch.tensor([[1, 1, 1, 0]]),  # a hidden latent
        ],
    )
    def test_refuses_what_is_no_padding_of_media(self, mask):
        assert dense.media_first(mask, 2) is None
