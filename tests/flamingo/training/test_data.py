"""Batches: the same whoever makes them, and from wherever one continues."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flamingo.training.bad import Bad, DataError
from flamingo.training.config import Documents, Pairs
from flamingo.training.data import Stream, count_targets, split
from flamingo.training.shards import document_sample, pair_sample, write_shards
from tests.helpers.same import assert_same
from tests.helpers.tiny_run import datasets, images, processor


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


@pytest.mark.parametrize("p_next", [0.0, 0.25, 1.0])
def test_p_next_is_the_share_that_sees_the_next_image(tmp_path, p_next):
    image = images(1, seed=0)[0]
    write_shards(tmp_path, [document_sample([image, f"page {i}"]) for i in range(100)])
    pages = Documents(name="pages", shards=(f"{tmp_path}/*.tar",), batch_size=100, p_next=p_next)
    batch = next(stream(pages))
    share = batch.media_starts[:, 0].float().mean().item()
    assert share == pytest.approx(p_next, abs=0.0 if p_next in (0, 1) else 0.15)


def test_a_first_token_is_never_counted(data):
    (batch,) = take(stream(datasets(data)[1]), 1)
    rows, length = batch.input_ids.shape
    assert count_targets(batch._replace(labels=batch.input_ids)) == rows * (length - 1)


def test_a_new_stream_leaves_the_runs_generator_alone(data):
    """A run that goes on has set it before."""
    before = torch.get_rng_state()
    stream(datasets(data)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_of_a_batch_is_drawn_for_on_its_own(tmp_path):
    """One image many times over: some are mirrored, some are not."""
    image = images(1, seed=0)[0]
    write_shards(tmp_path, [pair_sample(image, "text") for _ in range(20)])
    pairs = Pairs(name="pairs", shards=(f"{tmp_path}/*.tar",), batch_size=20, colour=0.0, space=0.0)
    (batch,) = take(stream(pairs), 1)
    assert len({each.numpy().tobytes() for each in batch.pixels}) == 2


@pytest.mark.parametrize("kind", range(3))
def test_a_sample_of_too_many_pixels_is_bad(data, kind):
    """The images of the data sets have 9 x 12."""
    config = replace(datasets(data)[kind], max_pixels=9 * 12)
    assert not any(bad_of(stream(config), 9))
    found = bad_of(stream(replace(config, max_pixels=9 * 12 - 1, batch_size=1)), 4)
    assert found
    assert all("at most 107 pixels in an image or a frame, got " in bad.reason for bad in found)


def bad_of(batches, count):
    """What is bad in so many batches; where nothing is left, what the error names."""
    found = []
    try:
        for _ in range(count):
            next(batches)
            found += batches.bad
    except DataError as error:
        found.append(Bad("", "", str(error)))
    return found


def jpeg(size=(64, 48)):
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(file, "JPEG")
    return file.getvalue()


GOOD = {"jpg": jpeg(), "txt": b"noise"}
# What is wrong with a pair, and how it is said.
BAD = {
    "cut": ({**GOOD, "jpg": jpeg()[:700]}, "that Pillow can read, got jpg"),
    "empty": ({**GOOD, "jpg": b""}, "that Pillow can read, got jpg"),
    "a web page": ({**GOOD, "jpg": b"<html>404</html>"}, "that Pillow can read, got jpg"),
    "no image": ({"txt": b"noise", "json": b"{}"}, "expected an image (png, jpg, jpeg, ...), got txt, json"),
    "no caption": ({"jpg": jpeg(), "json": b"{}"}, "expected a caption (txt, or in the json), got jpg, json"),
    "an empty caption": ({**GOOD, "txt": b" \n"}, "expected a caption, got an empty one"),
    "latin-1": ({**GOOD, "txt": "café".encode("latin-1")}, "'utf-8' codec can't decode byte 0xe9"),
    "damaged json": ({"jpg": jpeg(), "json": b'{"caption"'}, "Expecting ':' delimiter"),
    "deep json": ({"jpg": jpeg(), "json": b"[" * 100_000}, "recursion"),
}


@pytest.fixture(params=BAD)
def mixed(request, tmp_path):
    """Nineteen good samples and a bad one, and what is wrong with it."""
    sample, reason = BAD[request.param]
    shards = write_shards(tmp_path, [GOOD] * 7 + [sample] + [GOOD] * 12)
    return Pairs(name="pairs", shards=(f"{tmp_path}/*.tar",), batch_size=4), Bad(
        str(shards[0]), "000007", reason
    )


def test_a_bad_sample_is_left_out_once_an_epoch_and_the_batch_is_full(mixed):
    config, expected = mixed
    batches, found = stream(config), []
    for _ in range(10):
        assert next(batches).labels.shape[0] == 4
        found += batches.bad
    assert [(bad.shard, bad.sample) for bad in found] == [(expected.shard, "000007")] * 2
    assert expected.reason in found[0].reason


def test_it_continues_exactly_where_samples_are_bad(mixed):
    config, _ = mixed
    whole = stream(config)
    batches = take(whole, 10)
    for done in range(10):
        first = stream(config)
        take(first, done)
        assert_same(take(stream(config, state=first.state), 10 - done), batches[done:])


def test_workers_and_processes_agree_on_what_is_bad(mixed):
    config, _ = mixed

    def bad(**how):
        return bad_of(stream(config, **how), 10)

    alone = bad()
    assert bad(workers=2) == alone
    assert sorted(bad(rank=0, world_size=2) + bad(rank=1, world_size=2)) == sorted(alone)


def test_where_nothing_can_be_read_it_ends(tmp_path):
    write_shards(tmp_path, [{"txt": b"a"}, {"jpg": b"", "txt": b"a"}])
    config = Pairs(name="pairs", shards=(f"{tmp_path}/*.tar",), batch_size=1)
    for workers in (0, 1):
        with pytest.raises(
            DataError, match=r"'pairs': .*100 bad samples in a row, as \S*000000\.tar, sample .*; "
        ) as e:
            next(stream(config, workers=workers))
        assert "\n" not in str(e.value)


def test_a_damaged_shard_is_no_bad_sample(tmp_path):
    (shard,) = write_shards(tmp_path, [GOOD] * 3)
    shard.write_bytes(shard.read_bytes()[:5000])
    config = Pairs(name="pairs", shards=(str(shard),), batch_size=1)
    with pytest.raises(DataError, match=r"000000\.tar to be an uncompressed tar file, whole"):
        next(stream(config))


def test_another_seed_cannot_continue(data):
    config = datasets(data)[1]
    state = stream(config).state
    with pytest.raises(ValueError, match="seed and shards_at_once of the checkpoint for dataset 'pairs'"):
        stream(config, state=state, seed=1)
