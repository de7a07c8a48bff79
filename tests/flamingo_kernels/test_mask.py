"""MediaMask against plain Python loops."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

from flamingo_kernels import MediaMask
from tests.helpers.plain_mask import averages, seen

RULES = list(itertools.product((True, False), ("zero", "open_flamingo")))


def assert_mask(
    mask: MediaMask, text_time: torch.Tensor, num_media: int, immediate: bool, policy: str
) -> None:
    """Every field and view of a mask says what the loops say."""
    assert mask.num_media == num_media
    assert {mask.lo.dtype, mask.hi.dtype, mask.start.dtype, mask.stop.dtype} == {torch.int32}
    assert mask.lo.shape == mask.hi.shape == text_time.shape
    assert mask.start.shape == mask.stop.shape == (len(text_time), num_media)
    dense = mask.dense(num_latents=2)
    assert dense.shape == (len(text_time), 1, text_time.shape[1], 2 * num_media)
    for b, times in enumerate(text_time.tolist()):
        rows_of = {m: [] for m in range(num_media)}
        for t, time in enumerate(times):
            media = seen(time, num_media, immediate)
            lo, hi = mask.lo[b, t].item(), mask.hi[b, t].item()
            assert list(range(lo, hi)) == media
            assert mask.averages()[b, t].item() is averages(time, num_media, immediate, policy)
            assert (hi == -1) is averages(time, num_media, immediate, policy)
            assert dense[b, 0, t].tolist() == [m in media for m in range(num_media) for _ in range(2)]
            assert [bool(mask.sees(m)[b, t]) for m in range(num_media)] == [
                m in media for m in range(num_media)
            ]
            for m in media:
                rows_of[m].append(t)
        for m, rows in rows_of.items():
            start, stop = mask.start[b, m].item(), mask.stop[b, m].item()
            assert set(rows) <= set(range(start, stop))
            if times == sorted(times):
                assert list(range(start, stop)) == rows


@pytest.mark.parametrize(("immediate", "policy"), RULES)
@pytest.mark.parametrize(("length", "num_media"), [(0, 0), (0, 3), (1, 1), (9, 0), (9, 1), (13, 5), (40, 3)])
def test_any_text_time(length, num_media, immediate, policy):
    generator = torch.Generator().manual_seed(length + num_media)
    for _ in range(5):
        text_time = torch.randint(-1, num_media + 3, (3, length), generator=generator)
        for times in (text_time, text_time.sort(dim=1).values):
            mask = MediaMask.from_text_time(times, num_media, immediate=immediate, policy=policy)
            assert_mask(mask, times, num_media, immediate, policy)


@pytest.mark.parametrize(("immediate", "policy"), RULES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_locations(dtype, immediate, policy):
    build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
    locations = torch.rand(4, 23) < 0.2
    text_time = locations.cumsum(1)
    mask = build((locations * 3).to(dtype), 4, policy=policy)  # any non-zero integer marks an image
    assert_mask(mask, text_time, 4, immediate, policy)


@pytest.mark.parametrize(("immediate", "policy"), RULES)
@pytest.mark.parametrize("length", [0, 1, 7])
def test_cached(length, immediate, policy):
    prompt = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    text_time = torch.tensor([0, 1, 2, 4])[:, None].expand(-1, length)
    mask = MediaMask.cached(prompt, 3, length, immediate=immediate, policy=policy)
    assert_mask(mask, text_time, 3, immediate, policy)


def test_the_picture_in_the_documentation():
    locations = torch.tensor([[0, 1, 0, 0, 1, 0, 0]])
    last = MediaMask.last_preceding(locations, 2).dense(1)[0, 0].int().T.tolist()
    every = MediaMask.all_preceding(locations, 2).dense(1)[0, 0].int().T.tolist()
    assert last == [[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert every == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]


def test_immediate_says_that_no_row_sees_two_media():
    times = torch.tensor([[0, 1, 2, 3]])
    assert MediaMask.from_text_time(times, 2).immediate
    assert not MediaMask.from_text_time(times, 2, immediate=False).immediate
    assert MediaMask.from_text_time(times, 1, immediate=False).immediate


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask)), lambda m: m.to("cpu")]
)
def test_copies_are_the_same_mask(again):
    times = torch.randint(0, 5, (2, 9))
    assert_mask(again(MediaMask.from_text_time(times, 3)), times, 3, True, "zero")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MediaMask.from_text_time(torch.zeros(3), 1),
            r"integer text_time .*\(B, T\), got torch.float32",
        ),
        (
            lambda: MediaMask.from_text_time(torch.zeros(3, dtype=torch.long), 1),
            r"\(B, T\), got .* shape \(3,\)",
        ),
        (lambda: MediaMask.from_text_time(torch.zeros(1, 3, dtype=torch.bool), 1), r"got torch.bool"),
        (
            lambda: MediaMask.last_preceding(torch.zeros(1, 3), 1),
            r"bool or integer media_locations .* torch.float32",
        ),
        (
            lambda: MediaMask.all_preceding(torch.zeros(3, dtype=torch.bool), 1),
            r"\(B, T\), got .* shape \(3,\)",
        ),
        (lambda: MediaMask.cached(torch.zeros(1, 1, 1).bool(), 1, 2), r"\(B, T\), got .* shape \(1, 1, 1\)"),
        (lambda: MediaMask.last_preceding(torch.zeros(1, 3).bool(), -1), r"num_media >= 0, got -1"),
        (
            lambda: MediaMask.last_preceding(torch.zeros(1, 3).bool(), 1, policy="uniform"),
            r"policy='uniform' is not one of 'zero', 'open_flamingo'",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=f"^MediaMask: .*{message}"):
        build()


LOCATIONS = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MediaMask.from_text_time([[1]], 1), TypeError, r"text_time to be a torch\.Tensor, got list"),
        (
            lambda: MediaMask.last_preceding(LOCATIONS.numpy(), 1),
            TypeError,
            r"media_locations to be a torch\.Tensor, got ndarray",
        ),
        (lambda: MediaMask.all_preceding(LOCATIONS.to_sparse(), 1), TypeError, r"got torch\.sparse_coo"),
        (lambda: MediaMask.last_preceding(LOCATIONS.to(torch.complex64), 1), ValueError, r"torch\.complex64"),
        (
            lambda: MediaMask.last_preceding(LOCATIONS, 1.5),
            TypeError,
            "num_media to be an integer, got float 1.5",
        ),
        (lambda: MediaMask.last_preceding(LOCATIONS, True), TypeError, "an integer, got bool True"),
        (lambda: MediaMask.last_preceding(LOCATIONS, "2"), TypeError, "an integer, got str '2'"),
        (lambda: MediaMask.cached(LOCATIONS, 1, -1), ValueError, "length >= 0, got -1"),
        (lambda: MediaMask.cached(LOCATIONS, 1, 1.0), TypeError, "length to be an integer, got float"),
        (lambda: MediaMask.from_dense([[[True]]]), TypeError, r"visible to be a torch\.Tensor, got list"),
        (
            lambda: MediaMask.from_dense(LOCATIONS[None] > 0, max_latents=0),
            ValueError,
            "max_latents >= 1, got 0",
        ),
        (
            lambda: MediaMask.from_dense(LOCATIONS[None] > 0, averages=torch.ones(3, 2).bool()),
            ValueError,
            r"averages with shape \(1, 2\) to match visible, got \(3, 2\)",
        ),
        (
            lambda: MediaMask.from_dense(LOCATIONS[None] > 1, averages=torch.ones(1, 2)),
            TypeError,
            r"bool averages, got torch\.float32",
        ),
        (lambda: MediaMask.from_dense((LOCATIONS > 0).to("meta")[None]), ValueError, "got a tensor on meta"),
        (lambda: MediaMask.last_preceding(LOCATIONS, 2).fold(3), ValueError, "a divisor of B=2, got 3"),
        (lambda: MediaMask.last_preceding(LOCATIONS, 2).fold(0), ValueError, "texts >= 1, got 0"),
        (lambda: MediaMask.last_preceding(LOCATIONS, 2).dense(-1), ValueError, "num_latents >= 0, got -1"),
        (lambda: by_hand(lo=LOCATIONS), TypeError, r"lo in torch\.int32, got torch\.int64"),
        (
            lambda: by_hand(hi=LOCATIONS[:1].int()),
            ValueError,
            r"hi with shape \(2, 4\) to match lo, got \(1, 4\)",
        ),
        (lambda: by_hand(stop=LOCATIONS.int()), ValueError, r"stop with shape \(2, 2\) to match start"),
        (lambda: by_hand(start=None), TypeError, r"start to be a torch\.Tensor, got NoneType"),
        (lambda: by_hand(policy="none"), ValueError, "policy='none' is not one of"),
        (lambda: by_hand(hi=LOCATIONS.int().to("meta")), ValueError, "expected hi on cpu with lo, got meta"),
    ],
)
def test_what_cannot_be_meant(build, error, message):
    with pytest.raises(error, match=f"^MediaMask: .*{message}"):
        build()


def by_hand(**changed):
    mask = MediaMask.last_preceding(LOCATIONS, 2)
    names = ("lo", "hi", "start", "stop", "immediate", "policy")
    return MediaMask(**{**{name: getattr(mask, name) for name in names}, **changed})


@pytest.mark.parametrize("build", [MediaMask.last_preceding, MediaMask.all_preceding])
def test_joined_texts(build):
    """Rows keep what they see, and the rows from `start` to `stop` are all that see a medium."""
    mask = build(torch.rand(6, 7) < 0.3, 3)
    joined = mask.fold(3)
    sees = joined.dense(1)[:, 0]  # [B, T, M]
    assert torch.equal(sees, mask.dense(1)[:, 0].reshape(2, 21, 3))
    rows = torch.arange(21)[:, None]
    for start, stop, row_sees in zip(joined.start, joined.stop, sees, strict=True):
        assert not row_sees[(rows < start) | (rows >= stop)].any()
    one = MediaMask.last_preceding(torch.tensor([[True, False, False], [False, True, False]]), 1).fold(2)
    assert (one.start.item(), one.stop.item()) == (0, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32, torch.uint32])
@pytest.mark.parametrize("num_media", [300, np.int64(300)])
def test_narrow_counts_of_many_media(dtype, num_media):
    times = torch.tensor([[0, 1, 100, 127]])
    mask = MediaMask.from_text_time(times.to(dtype), num_media)
    assert mask.num_media == 300
    assert mask.hi.tolist() == times.tolist()
    assert mask.lo.dtype == torch.int32
    located = MediaMask.all_preceding(LOCATIONS.to(dtype), num_media)
    assert located.hi.tolist() == LOCATIONS.cumsum(1).tolist()


def test_any_number_stands_for_the_flag():
    mask = MediaMask.from_text_time(LOCATIONS, 2, immediate=1)
    assert mask.immediate is True


def runs(*spans, keys):
    """A dense mask of one sequence whose rows see these runs of keys."""
    key = torch.arange(keys)
    return torch.stack([(lo <= key) & (key < hi) for lo, hi in spans])[None]


class TestFromDense:
    @pytest.mark.parametrize(("latents", "num_media"), [(1, 1), (4, 3), (64, 5), (300, 2), (7, 0)])
    def test_says_what_the_dense_mask_says(self, latents, num_media):
        generator = torch.Generator().manual_seed(latents)
        ends = torch.randint(0, num_media + 1, (2, 3, 9), generator=generator)
        lo, hi = ends.min(0).values, ends.max(0).values
        media = torch.arange(num_media)
        seen = (lo[..., None] <= media) & (media < hi[..., None])
        visible = seen.repeat_interleave(latents, dim=-1)
        mask = MediaMask.from_dense(visible)
        assert torch.equal(mask.dense(visible.shape[-1] // max(mask.num_media, 1))[:, 0], visible)
        assert {mask.lo.dtype, mask.hi.dtype, mask.start.dtype, mask.stop.dtype} == {torch.int32}
        assert mask.immediate == bool((mask.hi - mask.lo <= 1).all())
        assert mask.policy == "zero"
        for m in range(mask.num_media):
            for b, t in mask.sees(m).nonzero().tolist():
                assert mask.start[b, m] <= t < mask.stop[b, m]

    @pytest.mark.parametrize(
        ("spans", "keys", "max_latents", "num_media"),
        [
            ([(0, 64), (64, 128)], 192, 256, 3),
            ([(0, 192), (0, 0)], 192, 256, 1),  # nothing to tell apart
            ([(0, 192)], 192, 100, 2),
            ([(64, 128)], 192, 63, 6),
            ([(0, 1601)], 6404, 256, 6404),  # a prime
            ([(0, 1601)], 6404, None, 4),
            ([(0, 0)], 6404, None, 1),
            ([(3, 4)], 6, 256, 6),
            ([(0, 256)], 512, 256, 2),  # as many as may be
        ],
    )
    def test_takes_the_largest_media(self, spans, keys, max_latents, num_media):
        assert MediaMask.from_dense(runs(*spans, keys=keys), max_latents=max_latents).num_media == num_media

    def test_rows_that_average(self):
        visible = runs((0, 0), (0, 0), (0, 4), keys=8)
        averages = torch.tensor([[True, False, True]])
        mask = MediaMask.from_dense(visible, averages=averages)
        assert mask.averages().tolist() == [[True, False, False]]
        assert mask.policy == "open_flamingo"
        assert MediaMask.from_dense(visible, averages=averages & False).policy == "zero"

    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
    def test_empty(self, shape):
        mask = MediaMask.from_dense(torch.ones(shape).bool())
        assert mask.lo.shape == shape[:2]
        assert mask.start.shape == (shape[0], mask.num_media)

    @pytest.mark.parametrize(
        ("visible", "message"),
        [
            (runs((0, 2), (1, 2), keys=4) ^ runs((3, 4), (0, 0), keys=4), r"a gap in row \(0, 0\)"),
            (runs((0, 2), (1, 2), keys=4) ^ runs((0, 0), (3, 4), keys=4), r"a gap in row \(0, 1\)"),
            (torch.ones(1, 2, 3), r"bool visible .* got torch.float32 with shape \(1, 2, 3\)"),
            (torch.ones(1, 2).bool(), r"\(B, T, S\), got torch.bool with shape \(1, 2\)"),
        ],
    )
    def test_bad_input(self, visible, message):
        with pytest.raises(ValueError, match=f"^MediaMask: .*{message}"):
            MediaMask.from_dense(visible)


@pytest.mark.parametrize("immediate", [True, False])
def test_spans_are_contiguous_wherever_they_come_from(immediate):
    """As kernels read them."""
    times = torch.tensor([[0, 1], [1, 2], [2, 2]]).T
    assert not times.is_contiguous()
    mask = MediaMask.from_text_time(times, 2, immediate=immediate)
    assert all(span.is_contiguous() for span in (mask.lo, mask.hi, mask.start, mask.stop))
    apart = by_hand(**{name: getattr(mask, name).T.contiguous().T for name in ("lo", "hi", "start", "stop")})
    assert all(span.is_contiguous() for span in apart.spans)
