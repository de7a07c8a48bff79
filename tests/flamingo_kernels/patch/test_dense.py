"""Dense masks as spans, without the libraries that make them."""

from __future__ import annotations

import pytest
import torch

from flamingo_kernels.patch import dense

LOWEST = torch.finfo(torch.float32).min
BIASES = (-1.0, 1.0, -1e4, torch.finfo(torch.float16).min, LOWEST / 2, torch.inf, torch.nan)


def added(visible: torch.Tensor) -> torch.Tensor:
    """A bool mask `[B, T, S]` as it is added to scores, `[B, 1, T, S]`."""
    return torch.where(visible, 0.0, LOWEST)[:, None]


def keys(*rows: str) -> torch.Tensor:
    """A bool mask of one sequence, drawn with # for what a row sees."""
    return torch.tensor([[[key == "#" for key in row] for row in rows]])


def spans_for(
    mask: torch.Tensor, rows: torch.Tensor | None = None, layer: object = None
) -> dense.KeySpans | None:
    text = torch.empty(mask.shape[0], mask.shape[-2], 0)
    return dense.key_spans(mask, text, rows, layer=layer)


def seen(spans: dense.KeySpans, count: int) -> torch.Tensor:
    """The mask that spans stand for, in the original order of the keys."""
    taken = count if spans.order is None else spans.order.shape[1]
    mask = spans.mask.dense(taken // spans.mask.num_media)[:, 0]
    if spans.order is None:
        return mask
    everything = torch.zeros(*mask.shape[:2], count, dtype=torch.bool)
    return everything.scatter(-1, spans.order[:, None].expand_as(mask), mask)


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
        spans = spans_for(as_given(visible), some)
        assert torch.equal(seen(spans, 6), visible)
        assert (spans.order is not None) == (rows[0] == "##..##")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_minus_infinity_hides_as_the_lowest_number_does(self, dtype):
        visible = keys("##....", "..##..", "..####")
        for closed in (-torch.inf, torch.finfo(dtype).min):
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, closed)[:, None]
            assert torch.equal(seen(spans_for(mask), 6), visible)

    def test_small_media_among_many_keys_are_left_to_a_dense_attention(self):
        for media, latents in ((16, 16), (17, 16), (256, 1), (257, 1), (32, 15)):
            visible = torch.arange(media * latents) < latents
            few = media * latents > 256 and latents < 16
            assert (spans_for(added(visible.expand(1, 2, -1))) is None) == few, (media, latents)

    def test_of_a_step_leaves_out_what_no_sequence_sees(self):
        visible = torch.cat([keys("##..##.."), keys("......##"), keys("........")])
        spans = spans_for(added(visible), visible.any(-1))
        assert spans.order.shape == (3, 4)
        assert torch.equal(seen(spans, 8), visible)

    @torch.no_grad()
    def test_of_a_step_that_sees_nothing_of_media_that_cannot_be_cut(self):
        """257 keys, as of 16 x 16 patches and a class token, have no useful divisor."""
        spans = spans_for(added(keys("." * 257)), torch.zeros(1, 1))
        assert spans.media(torch.randn(1, 257, 2, 3)).shape == (1, 1, 257, 2, 3)
        assert not spans.mask.dense(257).any()

    def test_of_a_step_that_sees_a_part_of_media_that_cannot_be_cut(self):
        """It takes what it sees, as one medium."""
        visible = torch.arange(257) < 250
        spans, kv = spans_for(added(visible[None, None])), torch.randn(1, 257, 2, 3)
        assert torch.equal(spans.media(kv), kv[:, :250].unflatten(1, (1, 250)))

    def test_keys_and_values_follow_the_order(self):
        visible = keys("##..##", "######")
        spans = spans_for(added(visible))
        kv = torch.randn(1, 6, 2, 3)
        media = spans.media(kv)
        assert media.shape == (1, spans.mask.num_media, 6 // spans.mask.num_media, 2, 3)
        lo, hi = spans.mask.lo[0, 0], spans.mask.hi[0, 0]
        assert torch.equal(media[0, lo:hi].flatten(0, 1), kv[0, visible[0, 0]])

    @pytest.mark.parametrize(
        "mask",
        [
            added(keys("#.#.", ".##.", "...#")),  # a gap
            added(keys("##..", "....")),  # a row that sees nothing, though it may
            *(torch.tensor([0.0, value])[None, None, None] for value in BIASES),
            added(keys("##.."))[:, 0],
            added(keys("##..")).expand(1, 2, 1, 4),  # another mask for every head
            added(torch.arange(1600) < torch.tensor([[[7], [1600]]])),  # media of one key
        ],
        ids=["gap", "blind row", *map(str, BIASES), "no heads", "two heads", "small media"],
    )
    def test_what_is_left_to_a_dense_attention(self, mask):
        assert spans_for(mask) is None

    @pytest.mark.parametrize(("batch", "length"), [(2, 1), (1, 2)])
    def test_a_mask_that_is_broadcast(self, batch, length):
        assert dense.key_spans(added(keys("##..")), torch.empty(batch, length, 0), layer=self) is None
        assert (
            dense.key_spans(added(keys("##..")), torch.empty(1, 1, 0), torch.ones(batch, length), layer=self)
            is None
        )

    def test_keys_of_another_number(self):
        spans = spans_for(added(keys("##..")))
        with pytest.raises(ValueError, match="expected a mask over 8 keys, got one over 4"):
            spans.media(torch.randn(1, 8, 2, 3))

    def test_is_read_once_and_again_when_it_changed(self, monkeypatch):
        reads = []
        read = dense.read_spans
        monkeypatch.setattr(dense, "read_spans", lambda *args: reads.append(1) or read(*args))
        mask, rows = added(keys("##..", "..##")), torch.ones(1, 2)
        first = spans_for(mask, rows)
        assert spans_for(mask, rows, "another layer") is first
        assert spans_for(mask) is not first
        mask[0, 0, 0, 2:] = 0
        assert torch.equal(seen(spans_for(mask), 4), keys("####", "..##"))
        spans_for(mask.clone())
        assert len(reads) == 4
        with torch.inference_mode():
            inferred = mask.clone()
            spans_for(inferred)
            inferred[0, 0, 0, 2:] = LOWEST
            assert torch.equal(seen(spans_for(inferred), 4), keys("##..", "..##"))

    def test_of_a_step_is_read_once_while_it_says_the_same(self, monkeypatch):
        """Each step of decoding makes its mask anew."""
        reads = []
        read = dense.read_spans
        monkeypatch.setattr(dense, "read_spans", lambda *args: reads.append(1) or read(*args))
        step, rows = added(keys("..##")), torch.ones(1, 1)
        first = spans_for(step, rows)
        with torch.inference_mode():
            assert spans_for(step.clone(), rows.clone()) is not first, (
                "it could not be saved for a backward pass"
            )
        first = spans_for(step.clone(), rows)
        assert spans_for(step.clone(), rows.clone()) is first
        assert len(reads) == 3
        step[..., :2] = 0
        assert torch.equal(seen(spans_for(step, rows), 4), keys("####"))
        assert not spans_for(step.clone(), torch.zeros(1, 1)).mask.dense(1).any()
        assert spans_for(step.double(), rows) is not None  # torch compares no other dtype
        prompt = added(keys("..##", "####"))
        assert spans_for(prompt) is not spans_for(prompt.clone())

    @torch.no_grad()
    def test_of_a_step_the_copy_of_what_it_sees_is_kept(self):
        visible = keys("##...#")
        spans, cache = spans_for(added(visible)), torch.randn(1, 2, 6, 3)
        kv = cache.transpose(1, 2)
        first = spans.media(kv)
        assert torch.equal(first.flatten(1, 2), kv[:, visible[0, 0]])
        assert spans.media(cache.transpose(1, 2)).data_ptr() == first.data_ptr()
        cache.mul_(2)
        assert torch.equal(spans.media(kv).flatten(1, 2), kv[:, visible[0, 0]])
        with torch.enable_grad():
            kv.requires_grad_()
            assert spans.media(kv).requires_grad

    @torch.no_grad()
    def test_of_a_prompt_no_copy_is_kept(self):
        spans, kv = spans_for(added(keys("##..##", "######"))), torch.randn(1, 6, 2, 3)
        assert spans.media(kv).data_ptr() != spans.media(kv).data_ptr()

    def test_is_not_read_while_traced(self):
        found = []

        def look(mask):
            found.append(spans_for(mask))
            return mask + 1

        torch.compile(look, backend="eager", fullgraph=True)(added(keys("##..")))
        assert found == [None]


def first_of(mask: torch.Tensor):
    clips, keys = len(mask), mask.shape[-1]
    return dense.media_first(mask, torch.empty(clips, keys - 2, 0), torch.empty(clips, 2, 0), layer=None)


class TestMediaFirst:
    def test_a_mask_over_other_keys_or_clips(self):
        mask, latents = torch.ones(2, 6), torch.empty(2, 2, 0)
        assert dense.media_first(mask, torch.empty(2, 3, 0), latents, layer=self) is None
        assert dense.media_first(mask[:1], torch.empty(2, 4, 0), latents, layer=self) is None

    @pytest.mark.parametrize("as_given", ["added", "padding"])
    def test_moves_what_is_seen_to_the_front(self, as_given):
        media = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        padding = torch.cat([media, torch.ones(3, 2, dtype=torch.long)], dim=1)
        mask = added(padding.bool()[:, None].expand(-1, 2, -1)) if as_given == "added" else padding
        order, lengths = first_of(mask)
        assert first_of(mask[1:])[0] is None
        assert order.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
        assert lengths.tolist() == [2, 4, 0]

    def test_padding_is_whatever_is_not_1(self):
        _, lengths = first_of(torch.tensor([[1, 2, 1, 0, 1, 1]]))
        assert lengths.tolist() == [2]

    def test_the_same_mask_for_more_latents(self):
        mask = torch.tensor([[1, 0, 1, 1, 1, 1]])
        for latents, found in ((2, 3), (3, 2), (2, 3)):
            shapes = torch.empty(1, 6 - latents, 0), torch.empty(1, latents, 0)
            _, lengths = dense.media_first(mask, *shapes, layer=latents)
            assert lengths.tolist() == [found]

    @pytest.mark.parametrize(
        "mask",
        [
            added(keys("#.##", "####")),  # rows that differ
            added(keys("####", "####"))[:, 0],
            torch.tensor([[1, 1, 1, 0]]),  # a hidden latent
            torch.tensor([[1, 1, 0, 1]]),
            added(keys("###.", "###.")),
            torch.tensor([0.0, -1e4, 0.0, 0.0])[None, None, None],  # a bias
        ],
    )
    def test_refuses_what_is_no_padding_of_media(self, mask):
        assert first_of(mask) is None
