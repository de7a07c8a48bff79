"""WUPS on a WordNet of a few words."""

import pytest

from flamingo.fewshot.metrics import load_words, wups
from tests.helpers.wordnet import write_tagger, write_wordnet

data = pytest.importorskip("nltk.data")


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "path", [str(write_wordnet(tmp_path))])
    return tmp_path


# A dog and a cat are 3 from the top, the entity, and meet 2 from it.
DOG_CAT = 2 * 2 / (3 + 3)
# A thing is 2 from the top, and meets a dog there.
DOG_THING = 2 * 1 / (3 + 2)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("a dog", "the dog", 1.0),
        ("Dogs", "dog", 1.0),
        ("beast", "animal", 1.0),  # one meaning
        ("dog", "cat", DOG_CAT),
        ("dog", "thing", DOG_THING),
        ("dog cat", "cat", DOG_CAT),  # the product of dog to cat and cat to cat
        ("cat", "dog cat", DOG_CAT),
        ("wug", "dog", 0.0),
        ("wug", "wug", 1.0),  # equal words need no meaning
        ("wug dog", "dog", 1.0),  # words without a meaning count for nothing
        ("ran", "run", 1.0),
        ("running", "run", 1.0),
        ("it is", "it is", 0.0),
        ("", "dog", 0.0),
    ],
)
def test_by_hand(wordnet, prediction, answer, expected):
    assert wups(prediction, answer) == pytest.approx(expected)


def test_below_a_threshold_a_tenth_counts(wordnet):
    assert wups("dog", "cat", threshold=0.6) == pytest.approx(DOG_CAT)
    assert wups("dog", "cat", threshold=0.9) == pytest.approx(DOG_CAT / 10)


def test_numbers_are_right_or_wrong(wordnet):
    assert wups("cat", "dog", exact=True) == 0
    assert wups("the dogs", "dog", exact=True) == 1


def test_lemmas_by_parts_of_speech(wordnet):
    """What somebody saw is a verb only to who looks at the text."""
    write_tagger(wordnet, {"saw": "VBD", "see": "VB", "dog": "NN"})
    assert wups("saw", "see", tagged=True) == 1
    assert wups("saw", "see") < 1


@pytest.mark.parametrize(
    ("tagged", "missing"), [(False, "wordnet"), (True, "averaged_perceptron_tagger_eng")]
)
def test_what_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch, tagged, missing):
    monkeypatch.setattr(data, "path", [str(write_wordnet(tmp_path) if tagged else tmp_path)])
    with pytest.raises(
        ValueError, match=rf"{missing} among .* found none\. Get it by python -m nltk\.downloader"
    ) as error:
        load_words(tagged=tagged)
    assert "\n" not in str(error.value)


def test_a_zip_is_read_as_well(tmp_path, monkeypatch):
    """As nltk's downloader leaves it."""
    import shutil

    write_wordnet(tmp_path / "data")
    (tmp_path / "zipped" / "corpora").mkdir(parents=True)
    shutil.make_archive(
        str(tmp_path / "zipped" / "corpora" / "wordnet"), "zip", tmp_path / "data" / "corpora", "wordnet"
    )
    monkeypatch.setattr(data, "path", [str(tmp_path / "zipped")])
    assert wups("dog", "cat") == pytest.approx(DOG_CAT)
