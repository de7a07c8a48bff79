"""Metrics against numbers worked out by hand."""

import math
import sys

import pytest
import torch

from flamingo.fewshot import cider, roc_auc, top_one, vqa_accuracy
from flamingo.fewshot.metrics import caption_words, normalise_answer


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


class TestCaptionWords:
    @pytest.mark.parametrize(
        ("caption", "words"),
        [
            ('A sign that says "STOP"!', "a sign that says stop"),
            ("The dog's bowl isn't full, they've eaten.", "the dog 's bowl is n't full they 've eaten"),
            ("He cannot see at 10:30 a.m. or 1,000 m", "he can not see at 10:30 a.m. or 1,000 m"),
            ("a half-eaten t-shirt - 'yes'...", "a half-eaten t-shirt yes"),
            ("bread & butter, (sliced)", "bread & butter -lrb- sliced -rrb-"),
            ("12 o'clock at a café", "12 o'clock at a café"),
            ("white cabinets,a stove", "white cabinets a stove"),
            ("", ""),
        ],
    )
    def test_as_the_penn_treebank(self, caption, words):
        assert " ".join(caption_words(caption)) == words


class TestCIDEr:
    def test_by_hand(self):
        # An n-gram of both images, as "a", weighs log(2 / 2) = 0; others weigh log 2, which cancels.
        mean, each = cider(["a cat on a mat", "a red bus"], [["a cat on the mat"], ["a red bus"]])
        first = 3 / math.sqrt(3 * 4) + 2 / math.sqrt(4 * 4) + 1 / math.sqrt(3 * 3) + 0
        second = 1 + 1 + 1 + 0  # three words have no 4-gram
        assert each == pytest.approx([10 * first / 4, 10 * second / 4])
        assert mean == pytest.approx(sum(each) / 2)

    def test_weights_are_the_inverse_of_frequency(self):
        references = [["dog runs"], ["dog sits"], ["cat sits"], ["bird"]]
        _, each = cider(["dog sits", "", "", ""], references)
        dog, runs, sits = math.log(4 / 2), math.log(4 / 1), math.log(4 / 2)
        cosine = dog**2 / (math.hypot(dog, sits) * math.hypot(dog, runs))
        assert each == pytest.approx([10 * cosine / 4, 0, 0, 0])  # "dog sits" is a bigram of another image

    def test_an_image_counts_once_however_many_references_say_it(self):
        _, each = cider(["red bus", "", ""], [["red bus", "red car"], ["car"], ["dog"]])
        red, bus, car = math.log(3 / 1), math.log(3 / 1), math.log(3 / 2)
        second = red**2 / (math.hypot(red, bus) * math.hypot(red, car))
        assert each[0] == pytest.approx(10 * ((1 + 1) / 4 + second / 4) / 2)

    def test_length_and_repetition_are_punished(self):
        references = [["a b c d"], ["e f"]]
        _, each = cider(["a b c d", "f"], references)
        assert each[0] == pytest.approx(10)
        _, repeated = cider(["a b c d a b c d", "f"], references)
        # Twice the 1-grams, clipped to one; 8 words to 4, so a penalty of exp(-16 / 72).
        cosines = [
            4 / math.sqrt(16 * 4),
            3 / math.sqrt((3 * 4 + 1) * 3),
            2 / math.sqrt((2 * 4 + 2) * 2),
            1 / math.sqrt((1 * 4 + 3) * 1),
        ]
        assert repeated[0] == pytest.approx(10 * math.exp(-16 / 72) * sum(cosines) / 4)

    def test_is_the_mean_over_references(self):
        others = [["e f g h"], ["i"]]
        _, both = cider(["a b c d", "", ""], [["a b c d", "x y z w"], *others])
        assert both[0] == pytest.approx(5)

    def test_one_image_says_nothing(self):
        assert cider(["a cat"], [["a cat"]]) == (0.0, [0.0])

    @pytest.mark.parametrize(
        ("references", "found"), [([["a"]], "lists of 1"), ([["a"], []], "lists of 1, 0")]
    )
    def test_references_for_each(self, references, found):
        with pytest.raises(ValueError, match=f"for each of 2 predictions, got {found}"):
            cider(["a", "b"], references)


class TestClasses:
    def test_top_one(self):
        scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.5, 0.4], [-3.0, -2.0, -1.0], [1.0, 0.0, 0.0]])
        assert top_one(scores, [1, 0, 2, 2]) == 0.75
        with pytest.raises(ValueError, match=r"scores \(N, C\) and N targets, got \(4, 3\) and \(3,\)"):
            top_one(scores, [0, 1, 2])
        with pytest.raises(ValueError, match=r"got \(0, 3\)"):
            top_one(scores[:0], [])

    def test_roc_auc_is_the_share_of_pairs_in_order(self):
        pytest.importorskip("sklearn")
        scores, labels = [0.1, 0.3, 0.3, 0.9, 0.2, 0.7], [0, 1, 0, 1, 0, 0]
        positive, negative = ([scores[i] for i in range(6) if labels[i] == kind] for kind in (1, 0))
        pairs = [(p, n) for p in positive for n in negative]
        share = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
        assert roc_auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(share)
        with pytest.raises(ValueError, match=r"labels of both kinds, got only \[1\]"):
            roc_auc([0.1, 0.2], [1, 1])

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
        with pytest.raises(ImportError, match=r"needs scikit-learn: pip install .*\[evaluate\]"):
            roc_auc([0.1, 0.2], [0, 1])
