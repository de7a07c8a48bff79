"""What the adapters for transformers share, without transformers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from flamingo_kernels.patch import parts

LOWEST = torch.finfo(torch.float32).min


def added(visible: torch.Tensor) -> torch.Tensor:
    """A bool mask `[B, T, S]` as it is added to scores, `[B, 1, T, S]`."""
    return torch.where(visible, 0.0, LOWEST)[:, None]


def keys(*rows: str) -> torch.Tensor:
    """A bool mask of one sequence, drawn with # for what a row sees."""
    return torch.tensor([[[key == "#" for key in row] for row in rows]])


def seen(spans: parts.KeySpans, count: int) -> torch.Tensor:
    """The mask that spans stand for, in the original order of the keys."""
    dense = spans.mask.dense(count // spans.mask.num_media)[:, 0]
    if spans.order is None:
        return dense
    return torch.zeros_like(dense).scatter(-1, spans.order[:, None].expand_as(dense), dense)


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
        spans = parts.key_spans(as_given(visible), some)
        assert torch.equal(seen(spans, 6), visible)
        assert (spans.order is not None) == (rows[0] == "##..##")

    def test_keys_and_values_follow_the_order(self):
        visible = keys("##..##", "######")
        spans = parts.key_spans(added(visible))
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
        assert parts.key_spans(mask, rows) is None

    def test_rows_that_average(self):
        rows = torch.tensor([[1, 1, 0]])
        spans = parts.key_spans(added(keys("##..", "....", "....")), rows, averages=True)
        assert spans.mask.averages().tolist() == [[False, True, False]]

    def test_is_read_once_and_again_when_it_changed(self, monkeypatch):
        reads = []
        read = parts._read_spans
        monkeypatch.setattr(parts, "_read_spans", lambda *args: reads.append(1) or read(*args))
        mask, rows = added(keys("##..", "..##")), torch.ones(1, 2)
        first = parts.key_spans(mask, rows)
        assert parts.key_spans(mask, rows) is first
        assert parts.key_spans(mask) is not first
        mask[0, 0, 0, 2:] = 0
        assert torch.equal(seen(parts.key_spans(mask), 4), keys("####", "..##"))
        parts.key_spans(mask.clone())
        assert len(reads) == 4
        with torch.inference_mode():
            inferred = mask.clone()
            parts.key_spans(inferred)
            inferred[0, 0, 0, 2:] = LOWEST
            assert torch.equal(seen(parts.key_spans(inferred), 4), keys("##..", "..##"))

    def test_is_not_read_while_traced(self):
        found = []

        def look(mask):
            found.append(parts.key_spans(mask))
            return mask + 1

        torch.compile(look, backend="eager", fullgraph=True)(added(keys("##..")))
        assert found == [None]


class TestMediaFirst:
    @pytest.mark.parametrize("dense", [True, False])
    def test_moves_what_is_seen_to_the_front(self, dense):
        media = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        padding = torch.cat([media, torch.ones(3, 2, dtype=torch.long)], dim=1)
        mask = added(padding.bool()[:, None].expand(-1, 2, -1)) if dense else padding
        order, lengths = parts.media_first(mask, 2)
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
        assert parts.media_first(mask, 2) is None


class TestKeptKV:
    @pytest.fixture
    def layer(self):
        return nn.ModuleDict({"k": nn.Linear(4, 6, bias=False), "v": nn.Linear(4, 6, bias=False)})

    def project(self, layer, media, calls=None):
        def compute():
            if calls is not None:
                calls.append(1)
            return layer["k"](media), layer["v"](media)

        return parts.kept_kv(layer, media, (layer["k"], layer["v"]), compute)

    @torch.no_grad()
    def test_once_for_all_views_of_the_same_media(self, layer):
        media, calls = torch.randn(6, 4), []
        first = self.project(layer, media.view(2, 3, 4), calls)
        again = self.project(layer, media.view(3, 2, 4).view(2, 3, 4), calls)
        assert again[0] is first[0]
        assert calls == [1]
        self.project(layer, media.view(3, 2, 4), calls)
        assert calls == [1, 1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer, media: media.mul_(2),
            lambda layer, media: layer["v"].weight.mul_(2),
            lambda layer, media: layer.load_state_dict({n: t * 2 for n, t in layer.state_dict().items()}),
            lambda layer, media: setattr(layer["k"], "weight", nn.Parameter(torch.randn(6, 4))),
            lambda layer, media: layer.__setitem__("k", nn.Linear(4, 6, bias=False)),
        ],
    )
    @torch.no_grad()
    def test_anew_after_a_change(self, layer, change):
        media = torch.randn(2, 4)
        self.project(layer, media)
        change(layer, media)
        k, v = self.project(layer, media)
        assert torch.equal(k, layer["k"](media))
        assert torch.equal(v, layer["v"](media))

    @torch.no_grad()
    def test_not_what_a_hook_or_an_adapter_may_change(self, layer):
        media = torch.randn(2, 4)
        self.project(layer, media)
        layer["k"].register_forward_hook(lambda *args: args[-1] + 1)
        assert torch.equal(self.project(layer, media)[0], layer["k"](media))

    def test_not_with_gradients(self, layer):
        media, calls = torch.randn(2, 4), []
        self.project(layer, media, calls)[0].sum().backward()
        self.project(layer, media, calls)[0].sum().backward()
        assert calls == [1, 1]

    @torch.no_grad()
    def test_each_layer_its_own(self, layer):
        media, other = torch.randn(2, 4), nn.ModuleDict({n: nn.Linear(4, 6, bias=False) for n in "kv"})
        self.project(layer, media)
        assert torch.equal(self.project(other, media)[0], other["k"](media))

    @torch.no_grad()
    def test_lives_no_longer_than_media_or_layer(self, layer):
        media = torch.randn(2, 4)
        k = weakref.ref(self.project(layer, media)[0])
        assert k() is not None
        del media
        gc.collect()
        assert k() is None
