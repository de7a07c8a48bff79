"""Short answers against numbers worked out by hand."""

import sys

import pytest

from flamingo.fewshot.metrics import (
    ivqa_accuracy,
    normalise_answer,
    open_flamingo_accuracy,
    stem_accuracy,
    vqa_accuracy,
)
from flamingo.fewshot.metrics.vqa import stem


class TestNormaliseAnswer:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("Yes", "yes"),
            (" The cat.\n", "cat"),
            ("two", "2"),
            ("none", "0"),
            ("eleven", "eleven"),
            ("an apple a day", "apple day"),
            ("t-shirt", "t shirt"),
            ("yes, it is", "yes it is"),
            ("red/blue", "red blue"),
            ("1,000", "1000"),
            ("1,000 t-shirts", "1000 tshirts"),  # a comma in a number: all marks are simply left out
            ("3.5", "3.5"),
            ("st. john", "st john"),
            ("dont", "don't"),
            ("it's", "it's"),
            ("Couldnt've", "couldn't've"),
            ("couldn'tve", "couldn't've"),
            ("couldntve", "couldntve"),
            ("twas", "'twas"),
            ("somebody'd", "somebodyd"),
            ("well", "well"),  # not we'll
            ("5:30", "5:30"),
            ("{what?!}", "what"),
            ("", ""),
        ],
    )
    def test_as_the_official_script(self, answer, expected):
        assert normalise_answer(answer) == expected


class TestVQAAccuracy:
    @pytest.mark.parametrize(
        ("agree", "expected"),
        # In `agree` of ten leave-one-out sets one who agrees is lost: min(1, (agree - 1) / 3).
        [(0, 0.0), (1, 0.9 / 3), (2, 0.2 / 3 + 0.8 * 2 / 3), (3, 0.3 * 2 / 3 + 0.7), (4, 1.0), (10, 1.0)],
    )
    def test_leaves_each_annotator_out(self, agree, expected):
        answers = ["yes"] * agree + [f"other {number}" for number in range(10 - agree)]
        assert vqa_accuracy("yes", answers) == pytest.approx(expected, abs=1e-12)

    def test_both_sides_are_normalised(self):
        assert vqa_accuracy("The two dogs", ["2 dogs"] * 10) == 1
        assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 1
        assert vqa_accuracy("2", ["Two."] * 5 + ["three"] * 5) == 1

    def test_needs_answers(self):
        with pytest.raises(ValueError, match="one annotator or more, got none"):
            vqa_accuracy("yes", [])

    def test_the_official_script_takes_what_all_say_as_it_is_written(self):
        assert vqa_accuracy("White", ["white"] * 10, unanimous_as_written=True) == 0
        assert vqa_accuracy(" t-shirt\n", ["t-shirt"] * 10, unanimous_as_written=True) == 1
        assert vqa_accuracy("White", ["white"] * 9 + ["grey"], unanimous_as_written=True) == 1


class TestOpenFlamingo:
    """Whoever said the same as surely as an annotator is left out with him."""

    @pytest.mark.parametrize(
        ("answers", "confidences", "expected"),
        [
            (["can"] * 10, ["yes"] * 10, 0.0),  # nobody is left
            # For one of the 8: 2 others, 2/3. For one of the 2: 8 others, 1.
            (["can"] * 10, ["yes"] * 8 + ["maybe"] * 2, (8 * 2 / 3 + 2) / 10),
            # For a can: nobody. For a bottle: 6 cans, 1.
            (["can"] * 6 + ["bottle"] * 4, ["yes"] * 10, 0.4),
        ],
    )
    def test_by_hand(self, answers, confidences, expected):
        assert open_flamingo_accuracy("a can", answers, confidences) == pytest.approx(expected)

    def test_needs_a_confidence_for_each(self):
        with pytest.raises(ValueError, match="one annotator or more, got 2 and 1"):
            open_flamingo_accuracy("can", ["can", "can"], ["yes"])


class TestStems:
    @pytest.fixture(autouse=True)
    def nltk(self):
        pytest.importorskip("nltk")

    def test_a_stem_is_right_where_another_form_was_said(self):
        assert stem("The surfers are Riding waves") == "surfer are ride wave"
        assert stem_accuracy("surfing", ["surf"] * 10) == 1
        assert stem_accuracy("surf", ["surfing"] * 10) == 1
        assert stem_accuracy("sailing", ["surfing"] * 10) == 0

    def test_the_files_stem_counts_too(self):
        """Porter makes "leav" of leaves, where the file has "leaf"."""
        assert stem_accuracy("leaf", ["leaves"] * 10) == 0
        assert stem_accuracy("leaf", ["leaves"] * 10, ["leaf"] * 10) == 1

    def test_three_annotators_are_enough_as_ever(self):
        # Two are held against one another, 2 * 1/3, and the other eight against both, 8 * 2/3.
        assert stem_accuracy("surfing", ["surfs"] * 2 + ["ski"] * 8) == pytest.approx(0.6)

    def test_an_empty_answer_is_nobodys(self):
        assert stem_accuracy("the", ["surf"] * 10) == 0

    def test_errors(self, monkeypatch):
        with pytest.raises(
            ValueError, match="one annotator or more, and a stem for each or none, got 0 and 0"
        ):
            stem_accuracy("surf", [])
        with pytest.raises(ValueError, match="got 2 and 1"):
            stem_accuracy("surf", ["surf", "surf"], ["surf"])


def test_without_nltk(monkeypatch):
    from flamingo.fewshot.metrics import vqa

    vqa._porter.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(ImportError, match=r'needs nltk\. .* pip install "\.\[evaluate\]"'):
        stem("words that no other test has asked for")
    vqa._porter.cache_clear()


@pytest.mark.parametrize(("said", "expected"), [("Spoon", 1.0), ("knife", 0.5), ("fork", 0.0)])
def test_two_annotators_of_ivqa_are_enough(said, expected):
    assert ivqa_accuracy(said, ["spoon", "a spoon", "the spoon", "knife", "bowl"]) == expected
    with pytest.raises(ValueError, match="one annotator or more, got none"):
        ivqa_accuracy(said, [])
