"""The order of samples: complete, shuffled, and the same from wherever one starts."""

from collections import Counter
from itertools import islice

import pytest

from flamingo.training.order import Position, SampleOrder
from flamingo.training.shards import write_shards

SAMPLES = 23


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    samples = ({"txt": str(i).encode()} for i in range(SAMPLES))
    return list(map(str, write_shards(tmp_path_factory.mktemp("data"), samples, samples_per_shard=5)))


def numbers(shards, count=2 * SAMPLES, position=Position(), **changes):  # noqa: B008
    order = SampleOrder(shards, **{"seed": 0, "at_once": 2, **changes})
    return [int(draw.entry.read()["txt"]) for draw, _ in islice(order.draws(position), count)]


def test_an_epoch_has_every_sample_once(shards):
    found = numbers(shards)
    for epoch in (found[:SAMPLES], found[SAMPLES:]):
        assert Counter(epoch) == Counter(range(SAMPLES))
        assert epoch != sorted(epoch)
    assert found[:SAMPLES] != found[SAMPLES:]


def test_it_is_a_function_of_the_seed(shards):
    assert numbers(shards) == numbers(shards[::-1])
    assert numbers(shards) != numbers(shards, seed=1)
    assert numbers(shards) != numbers(shards, at_once=3)


def test_shards_of_a_group_are_shuffled_together(shards):
    """And no others: the first ten samples are those of two shards, mixed."""
    first = [number // 5 for number in numbers(shards, at_once=2, seed=3)[:10]]
    assert len(set(first)) == 2
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_it_continues_from_every_position(shards):
    order = SampleOrder(shards, seed=0, at_once=2)
    drawn = list(islice(order.draws(Position()), 2 * SAMPLES + 1))
    for place, (_, position) in enumerate(drawn):
        rest = [draw for draw, _ in islice(order.draws(position), 3)]
        expected = [draw for draw, _ in drawn[place + 1 : place + 4]]
        assert rest[: len(expected)] == expected


def test_shards_come_in_another_order_in_every_epoch(shards):
    found = numbers(shards, at_once=1)
    first, second = ([number // 5 for number in each] for each in (found[:SAMPLES], found[SAMPLES:]))
    assert list(dict.fromkeys(first)) != list(dict.fromkeys(second))


def test_every_group_of_every_epoch_has_a_shuffle_of_its_own(shards):
    """Shards of five samples one by one: their places in them differ."""
    found = [number % 5 for number in numbers(shards[:4], at_once=1, count=40)]
    places = {tuple(found[start : start + 5]) for start in range(0, 40, 5)}
    assert len(places) > 5
    one = numbers(shards[:1], at_once=1, count=25)
    assert len({tuple(one[start : start + 5]) for start in range(0, 25, 5)}) > 3


def test_it_starts_at_the_beginning_of_any_group_and_epoch(shards):
    found = numbers(shards[:4], at_once=1)
    for position, start in (
        (Position(0, 1), 5),
        (Position(0, 3), 15),
        (Position(1), 20),
        (Position(1, 2), 30),
    ):
        assert numbers(shards[:4], at_once=1, position=position, count=9) == found[start : start + 9]


def test_seeds_of_samples_never_repeat(shards):
    """Not in a run, and not in one of another seed."""
    seeds = set()
    for seed in (0, 1):
        draws = islice(SampleOrder(shards, seed=seed, at_once=2).draws(Position()), 3 * SAMPLES)
        seeds |= {draw.seed for draw, _ in draws}
    assert len(seeds) == 2 * 3 * SAMPLES


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch(shards, world_size):
    """Whatever their number, together they have the batches of one process, and the same position."""
    order = SampleOrder(shards, seed=0, at_once=2)
    one = list(islice(order.batches(6, Position()), 9))
    shares = [
        list(islice(order.batches(6, Position(), rank=rank, world_size=world_size), 9))
        for rank in range(world_size)
    ]
    for (batch, position), *parts in zip(one, *shares, strict=True):
        assert [draw for part, _ in parts for draw in part] == batch
        assert {after for _, after in parts} == {position}


def test_a_batch_that_cannot_be_shared_is_refused(shards):
    with pytest.raises(ValueError, match="batch_size that 4 processes can share evenly, got 6"):
        next(SampleOrder(shards, seed=0, at_once=1).batches(6, Position(), world_size=4))


def test_no_samples_are_an_error_and_not_a_wait(tmp_path):
    empty = write_shards(tmp_path, [{}])
    with pytest.raises(ValueError, match=r"expected samples in .*000000\.tar, got none"):
        numbers(list(map(str, empty)))
    with pytest.raises(ValueError, match="expected shards, got none"):
        SampleOrder([], seed=0, at_once=1)


def test_substitutes_are_any_samples_by_the_draw_and_the_attempt(shards, tmp_path):
    order = SampleOrder(shards, seed=0, at_once=2)
    (draw, _), (other, _) = islice(order.draws(Position()), 2)
    found = [order.substitute(draw, attempt) for attempt in range(1, 300)]
    assert found == [order.substitute(draw, attempt) for attempt in range(1, 300)]
    assert {int(each.entry.read()["txt"]) for each in found} == set(range(SAMPLES))
    assert len({each.seed for each in (draw, *found)}) == 300
    assert [order.substitute(other, attempt).entry for attempt in range(1, 300)] != [
        each.entry for each in found
    ]
    empty = SampleOrder(list(map(str, write_shards(tmp_path, [{}]))), seed=0, at_once=1)
    assert empty.substitute(draw, 1).entry == draw.entry


def test_its_identity_does_not_depend_on_the_folder(shards, tmp_path):
    def identity(paths, **changes):
        return SampleOrder(paths, **{"seed": 0, "at_once": 2, **changes}).identity

    moved = [shard.replace("data", "elsewhere") for shard in shards]
    assert identity(moved) == identity(shards)
    assert (
        len({identity(shards), identity(shards[1:]), identity(shards, seed=1), identity(shards, at_once=1)})
        == 4
    )
