"""Short answers against those of several annotators."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flamingo.fewshot.metrics.words import import_nltk

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Contractions, which get back an apostrophe that is missing.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
    """,
)
_MISSPELT = {
    word[: found.start()] + word[found.end() :]: word
    for word in _CONTRACTIONS
    for found in re.finditer("'", word)
}
_MISSPELT["somebody'd"] = "somebodyd"  # as the official script has it
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise_answer(text: str) -> str:
    """An answer as VQA's official script compares it.

    Punctuation goes, or becomes a space where it stands between letters; number words become digits, articles
    go, contractions get their apostrophe back.

    Source: the evaluation code of arXiv 1505.00468, at visualqa.org/evaluation.

    >>> normalise_answer("The two T-shirts, arent they?")
    "2 t shirts aren't they"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    without = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        apart = in_number or f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if apart else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", without).lower().split()]
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, unanimous_as_written: bool = False) -> float:
    """How many annotators agree with a prediction, three being enough.

    ::

        mean over annotators i of min(1, (others than i who said the prediction) / 3)

    Both sides are normalised. The official script normalises neither where all annotators agree: with it
    "White" is wrong there if they wrote "white".

    Args:
        prediction: the model's answer.
        answers: of the annotators; 10 in VQAv2.
        unanimous_as_written: do as the official script.

    Returns:
        A number in 0..1.

    Raises:
        ValueError: without answers.

    Source: arXiv 1505.00468 and its evaluation code.

    >>> vqa_accuracy("Two", ["2", "2", "2", "three", "3", "4", "4", "4", "4", "4"])
    0.9
    """
    if not answers:
        raise ValueError("vqa_accuracy: expected the answers of one annotator or more, got none.")
    if unanimous_as_written and len({_stripped(answer) for answer in answers}) == 1:
        return _agreement([_stripped(answer) == _stripped(prediction) for answer in answers])
    said = normalise_answer(prediction)
    return _agreement([normalise_answer(answer) == said for answer in answers])


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(agrees: Sequence[bool]) -> float:
    """The accuracy of a prediction with which these annotators agree."""
    total = sum(agrees)
    return sum(min(1.0, (total - agree) / 3) for agree in agrees) / len(agrees)


def open_flamingo_accuracy(prediction: str, answers: Sequence[str], confidences: Sequence[str]) -> float:
    """The accuracy of open_flamingo's script for annotators without ids, as VizWiz has them.

    ::

        mean over annotators i of min(1, (who said the prediction and is not like i) / 3)

    Like i is who gave the same answer as surely: with i all of these are left out, not i alone, so a
    prediction that ten annotators gave, all of them sure, scores 0.

    Args:
        prediction, answers: see `vqa_accuracy`.
        confidences: of the annotators, as "yes" and "maybe".

    Returns:
        A number in 0..1.

    Raises:
        ValueError: without answers, or if the two differ in length.

    Source: github.com/mlfoundations/open_flamingo, eval/vqa_metric.py.

    >>> open_flamingo_accuracy("a can", ["can"] * 10, ["yes"] * 10)
    0.0
    """
    if not answers or len(answers) != len(confidences):
        raise ValueError(
            "open_flamingo_accuracy: expected an answer and a confidence of one annotator or more, got "
            f"{len(answers)} and {len(confidences)}."
        )
    said = normalise_answer(prediction)
    given = [*zip(map(normalise_answer, answers), confidences, strict=True)]
    agree = [sum(other[0] == said and other != own for other in given) for own in given]
    return sum(min(1.0, count / 3) for count in agree) / len(given)


def stem_accuracy(prediction: str, answers: Sequence[str], stems: Sequence[str] = ()) -> float:
    """OK-VQA's accuracy: `vqa_accuracy` of stems, so that "surfing" is right where people said "surf".

    An annotator agrees whose answer has the prediction's stem, or of whom the file has it as the stem. The
    file's are of a stemmer of its own, which was never published. Here, as in the paper's reproductions, it
    is another one: Porter's. open_flamingo imitates the file's by a list of exceptions.

    Args:
        prediction: the model's answer.
        answers: what the annotators said.
        stems: what the file has as their stems; none if it has none.

    Returns:
        A number in 0..1.

    Raises:
        ImportError: without nltk.
        ValueError: without answers, or if there are stems and they differ from the answers in number.

    Source: okvqa.allenai.org; M. F. Porter, An algorithm for suffix stripping, 1980.

    >>> stem_accuracy("surfing", ["surf"] * 6 + ["surfs"] * 4)
    1.0
    """
    if not answers or (stems and len(stems) != len(answers)):
        raise ValueError(
            "stem_accuracy: expected the answers of one annotator or more, and a stem for each or none, got "
            f"{len(answers)} and {len(stems)}."
        )
    said = stem(prediction)
    known = [normalise_answer(each) for each in stems] or [""] * len(answers)
    return _agreement(
        [bool(said) and said in (stem(answer), each) for answer, each in zip(answers, known, strict=True)]
    )


@lru_cache(maxsize=2**16)
def stem(answer: str) -> str:
    """An answer, normalised, each word without its endings.

    Raises:
        ImportError: without nltk.

    >>> stem("The surfers are riding waves.")
    'surfer are ride wave'
    """
    return " ".join(_porter().stem(word) for word in normalise_answer(answer).split())


@lru_cache(maxsize=1)
def _porter() -> Any:
    return import_nltk("nltk.stem.porter").PorterStemmer()


def answer_matches(prediction: str, answers: Sequence[str]) -> int:
    """How many answers are the prediction, both sides normalised.

    >>> answer_matches("A cat.", ["cat", "the cat", "dog"])
    2
    """
    said = normalise_answer(prediction)
    return sum(normalise_answer(answer) == said for answer in answers)


def ivqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """iVQA's accuracy: 1 if two of the five annotators gave the answer, 0.5 if one did.

    ::

        min(1, (annotators who said the prediction) / 2)

    Its authors' model chooses among the answers that are there twice in training; here any text may be said,
    and both sides are normalised.

    Args:
        prediction: the model's answer.
        answers: of the annotators.

    Returns:
        A number in 0..1.

    Raises:
        ValueError: without answers.

    Source: arXiv 2012.00451, section 5.2, and its code (just-ask).

    >>> ivqa_accuracy("a knife", ["knife", "spoon", "spoon", "the spoon", "fork"])
    0.5
    """
    if not answers:
        raise ValueError("ivqa_accuracy: expected the answers of one annotator or more, got none.")
    return min(1.0, answer_matches(prediction, answers) / 2)
