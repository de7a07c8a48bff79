"""Batches: the same whoever makes them, and from wherever one continues."""

from dataclasses import replace

import pytest
import torch

from flamingo.training.data import Stream, count_targets, split
from flamingo.training.shards import write_shards
from tests.helpers.same import assert_same
from tests.helpers.tiny_run import datasets, processor


def stream(config, **changes):
    return Stream(config, processor(), **{"seed": 0, "at_once": 2, **changes})


def take(batches, count=4):
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("kind", range(3))
def test_it_continues_from_its_state(data, kind):
    config = datasets(data)[kind]
    first = stream(config)
    take(first, 3)
    assert_same(take(stream(config, state=first.state)), take(first))


def test_workers_change_nothing(data):
    """Though they read ahead, the state is that of the batch that was taken."""
    config = datasets(data)[1]
    alone, helped = stream(config), stream(config, workers=2)
    assert_same(take(helped, 5), take(alone, 5))
    assert helped.state == alone.state


def test_two_processes_have_the_documents_of_one(data):
    config = datasets(data)[0]
    whole = take(stream(config))
    for rank in (0, 1):
        for mine, batch in zip(take(stream(config, rank=rank, world_size=2)), whole, strict=True):
            length = int(mine.attention_mask.sum())
            for name in ("input_ids", "media_starts"):
                assert torch.equal(getattr(mine, name)[0, :length], getattr(batch, name)[rank, :length])


def test_padding_and_images_are_not_learned(data):
    (batch,) = take(stream(replace(datasets(data)[0], batch_size=7)), 1)
    ids, labels = batch.input_ids, batch.labels
    tokenizer = processor().tokenizer
    unlearned = (ids == tokenizer.image_id) | (ids == tokenizer.pad_id) | (ids == tokenizer.bos_id)
    assert unlearned.any()
    assert torch.equal(labels == -100, unlearned)
    assert torch.equal(labels[~unlearned], ids[~unlearned])
    assert count_targets(batch) == (~unlearned).sum()


def test_splits_add_up(data):
    (batch,) = take(stream(datasets(data)[2]), 1)
    one, two = split(batch, 1)
    assert torch.equal(torch.cat((one.pixels, two.pixels)), batch.pixels)
    assert count_targets(one) + count_targets(two) == count_targets(batch)
    assert_same(list(split(batch, None)), [batch])


def test_half_of_the_documents_see_the_next_image(data):
    """Those that do begin to see at <BOS>; pairs have one image, and never look ahead."""
    pages, pairs, _ = datasets(data)
    begins = [batch.media_starts[:, 0].any() for batch in take(stream(replace(pages, batch_size=1)), 200)]
    assert 60 < sum(begins) < 120  # a seventh of the documents has no image
    assert not any(batch.media_starts[:, 0].any() for batch in take(stream(pairs), 20))


@pytest.mark.parametrize("p_next", [0.0, 0.1, 0.9, 1.0])
def test_as_many_documents_see_the_next_image_as_asked(data, p_next):
    pages = replace(datasets(data)[0], batch_size=1, p_next=p_next)
    begins = [
        batch.media_starts[:, 0].any() for batch in take(stream(pages), 60) if batch.num_media.item() > 0
    ]
    assert abs(sum(begins) / len(begins) - p_next) <= 0.12 * (0 < p_next < 1)


def test_a_damaged_sample_is_named(data, tmp_path):
    write_shards(tmp_path, [{"png": b"damaged", "txt": b"text"}])
    config = replace(datasets(data)[1], shards=(f"{tmp_path}/*.tar",))
    with pytest.raises(
        ValueError, match=r"000000\.tar, sample 000000: .* image that Pillow can read, got png"
    ):
        next(stream(config))


@pytest.mark.parametrize("kind", range(3))
def test_a_sample_of_too_many_pixels_is_named(data, kind):
    """The images of the data sets have 9 x 12."""
    config = replace(datasets(data)[kind], max_pixels=9 * 12)
    take(stream(config), 1)
    with pytest.raises(ValueError, match=r"\d{6}\.tar, sample \d{6}: .*at most 107 pixels .* 12 x 9"):
        take(stream(replace(config, max_pixels=9 * 12 - 1)), 9)


def test_another_seed_cannot_continue(data):
    config = datasets(data)[1]
    state = stream(config).state
    with pytest.raises(ValueError, match="seed and shards_at_once of the checkpoint for dataset 'pairs'"):
        stream(config, state=state, seed=1)
