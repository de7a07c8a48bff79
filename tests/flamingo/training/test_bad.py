"""How many bad samples are too many."""

import pytest

from flamingo.training.bad import Bad, DataError, Tally, examples

ONE = Bad("a.tar", "7", "it is no image")


def stops(max_bad, batches, epochs=None):
    """After how many batches of `(drawn, bad)` a run stops, or None."""
    tally = Tally("pairs", max_bad)
    for number, (drawn, bad) in enumerate(batches, 1):
        epoch = epochs[number - 1] if epochs else 0
        try:
            tally.add(drawn, [ONE] * bad, epoch)
        except DataError:
            return number
    return None


@pytest.mark.parametrize(
    ("max_bad", "batches", "stopped"),
    [
        (0.1, [(2, 1)], None),  # one in ten may be among the first two
        (0.1, [(2, 1)] * 5, 3),  # half of them cannot be chance
        (0.1, [(10, 1)] * 100, None),
        (0.1, [(100, 19)] * 9, 2),
        (0.1, [(1000, 131)], 1),
        (0.1, [(1000, 130)], None),
        (0.0, [(1000, 0), (1000, 1)], 2),
        (1.0, [(9, 9)] * 9, None),
    ],
)
def test_within_an_epoch_chance_is_allowed_for(max_bad, batches, stopped):
    assert stops(max_bad, batches) == stopped


def test_after_an_epoch_the_share_counts():
    """Of twenty samples three are bad, or two."""
    three = [(2, int(number in (0, 4, 8))) for number in range(11)]
    assert stops(0.1, three, [0] * 10 + [1]) == 11
    two = [(2, int(number in (0, 4, 10))) for number in range(11)]
    assert stops(0.1, two, [0] * 10 + [1]) is None


def test_it_is_judged_at_the_end_of_every_epoch_and_in_none():
    tally = Tally("pairs", 0.1)
    tally.add(20, [ONE] * 2, 0)
    tally.add(20, [ONE] * 3, 1)
    tally.add(4, [], 1)
    with pytest.raises(DataError, match="got 5 of 45"):
        tally.add(1, [], 2)


def test_it_continues_from_its_state():
    tally = Tally("pairs", 0.1)
    tally.add(20, [ONE] * 2, 1)
    again = Tally("pairs", 0.1, {"order": "x", **tally.state})
    assert (again.drawn, again.bad, again.epoch) == (20, 2, 1)
    old = Tally("pairs", 0.1, {"order": "x", "position": (3, 0, 0)})  # of before bad samples were counted
    assert old.state == {"drawn": 0, "bad": 0, "epoch": 0, "latest": []}
    with pytest.raises(DataError, match=r"got 6 of 24, as a\.tar, sample 7: it is no image"):
        Tally("pairs", 0, {**tally.state, "drawn": 24, "bad": 6}).add(0, [], 1)


def test_the_error_has_an_example_of_each_reason():
    bad = [ONE, Bad("a.tar", "8", "it is no image"), Bad("b.tar", "1", "cut")]
    assert examples(bad) == "a.tar, sample 7: it is no image; b.tar, sample 1: cut"
    with pytest.raises(
        DataError, match=r"'pairs': .*at most max_bad = 0 .*got 3 of 9, as a\.tar, sample 7: .*; b\.tar"
    ):
        Tally("pairs", 0).add(9, bad, 0)
