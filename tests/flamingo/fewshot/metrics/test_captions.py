"""CIDEr against numbers worked out by hand."""

import math

import pytest

from flamingo.fewshot.metrics import caption_words, cider


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
