"""RareAct's metric against a case worked out by hand."""

import pytest

from flamingo.fewshot.metrics import Action, mean_weighted_ap

pytest.importorskip("sklearn")
CUT_PHONE, CUT_BOOK, WASH_CAR = 0, 1, 2


def clip(video, label, annotation):
    return Action(video, label, *(("cut", "phone"), ("cut", "book"), ("wash", "car"))[label], annotation)


CLIPS = [
    clip("a", CUT_PHONE, 1),
    clip("a", CUT_PHONE, 1),
    clip("b", CUT_PHONE, 1),
    clip("c", CUT_PHONE, 2),  # something else is cut
    clip("d", CUT_PHONE, 0),
    clip("c", CUT_BOOK, 1),  # hard to tell from a phone that is cut
    clip("e", WASH_CAR, 0),  # nobody's, as it shows no car
]
SCORES = [
    # phone, book, car
    [0.9, 0.1, 0.0],
    [0.8, 0.2, 0.0],
    [0.3, 0.3, 0.0],
    [0.7, 0.4, 0.0],
    [0.5, 0.5, 0.0],
    [0.6, 0.6, 0.0],
    [1.0, 0.7, 0.0],
]


def test_by_hand():
    # A phone is cut: a (1/2), a (1/2), c (1/2) and c (1/2) that are hard to tell, d (1) that is wrong, b (1).
    # Precision at half, all of a's weight, and then at b's: 2 of 4.
    phone = 1 / 4 * 1 + 1 / 4 * 1 + 1 / 2 * 2 / 4
    # A book is cut: c (1), and b (1), a (1/2), a (1/2), which cut a phone. What was looked at for a phone and
    # shows none is nothing to the book.
    book = 1.0
    assert mean_weighted_ap(SCORES, CLIPS) == pytest.approx((phone + book) / 2)  # no car is washed


def test_a_clip_of_another_verb_and_noun_is_wrong():
    clips = [clip("a", CUT_PHONE, 1), clip("a", WASH_CAR, 1)]
    # Each alone in its row, so both weigh 1, though they are of one video.
    assert mean_weighted_ap([[0.1, 0.0, 0.9], [0.2, 0.0, 0.1]], clips) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_hard_to_tell_and_wrong_are_weighed_apart():
    """Two clips of one video, one in each group, weigh 1 each."""
    clips = [clip("a", CUT_PHONE, 1), clip("b", CUT_PHONE, 2), clip("b", CUT_PHONE, 0)]
    assert mean_weighted_ap([[0.1], [0.5], [0.6]], clips) == pytest.approx(1 / 3)


def test_errors():
    with pytest.raises(ValueError, match="one or more that show their class, got 1 and 1, of which 0 do"):
        mean_weighted_ap([[0.1]], [clip("a", CUT_PHONE, 0)])
    with pytest.raises(ValueError, match="got 2 and 1"):
        mean_weighted_ap([[0.1], [0.1]], [clip("a", CUT_PHONE, 1)])
