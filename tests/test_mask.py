"""MediaMask against plain Python loops."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from flamingo_kernels import MediaMask

from .plain_mask import averages, seen

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
