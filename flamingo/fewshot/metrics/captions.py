"""Captions against those that people wrote."""

import math
import re
from collections import Counter
from collections.abc import Sequence

_NGRAMS = 4
_SIGMA = 6.0
_CONTRACTED = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b|(?<=\bcan)(?=not\b)")
_WORD = re.compile(
    r"""
    n't | '(?:s|re|ve|ll|d|m)\b
    | (?:[a-z]\.){2,}                    # a.m.
    | \d+(?:[.,:]\d+)+
    | \w+(?:[-'./]\w+)*
    | -[lr]rb- | [#$%&@+=/]
    """,
    re.VERBOSE,
)


def caption_words(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation, contractions taken apart as in the Penn Treebank.

    >>> caption_words("A man's dog isn't on the well-worn mat.")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'on', 'the', 'well-worn', 'mat']
    """
    text = caption.lower().replace("’", "'")
    # The official list of punctuation to leave out has these in capitals, so they stay.
    text = text.replace("(", " -lrb- ").replace(")", " -rrb- ")
    return _WORD.findall(_CONTRACTED.sub(r" \g<0>", text))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr-D: how much a caption's n-grams are those of its references, rare ones counting most.

    ::

        g = the counts of the n-grams of a caption, each times log(N / images whose references have it)
        cosine[n] = min(g(c), g(r)) . g(r) / (|g(c)| |g(r)|)
        CIDEr(c) = 10 * mean over n and r of exp(-(l(c) - l(r))^2 / (2 * 6^2)) * cosine[n]

    for the caption c, its references r, n = 1..4 and l the number of words. On the same words it is the
    official scorer's number. That one finds words by a program in Java; `caption_words` has those of its
    rules that captions need.

    Args:
        predictions: one caption for each of N images.
        references: the captions people wrote for each image.

    Returns:
        The mean over the images and the score of each; papers print 100 times the mean.

    Raises:
        ValueError: if the two differ in length, or an image has no reference.

    Limits: with one image every n-gram is in all images, and the score is 0.

    Source: arXiv 1411.5726, section 5 (CIDEr-D, n to 4, sigma 6).

    >>> mean, each = cider(["a cat on a mat", "a red bus"], [["a cat on the mat"], ["a red bus"]])
    >>> print(f"{mean:.3f} {each[0]:.3f} {each[1]:.3f}")
    5.874 4.248 7.500
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"cider: expected one reference or more for each of {len(predictions)} predictions, got lists of "
            f"{', '.join(str(len(few)) for few in references[:8]) or 'none'}."
        )
    seen = [[_ngrams(caption) for caption in captions] for captions in references]
    images = Counter(ngram for captions in seen for ngram in set().union(*captions))
    weights = {ngram: math.log(len(references)) - math.log(count) for ngram, count in images.items()}
    unseen = math.log(len(references)) if references else 0.0
    each = []
    for prediction, captions in zip(predictions, seen, strict=True):
        said = _ngrams(prediction)
        scores = [_similarity(said, caption, weights, unseen) for caption in captions]
        each.append(10.0 * sum(scores) / len(scores))
    return (sum(each) / len(each) if each else 0.0), each


def _ngrams(caption: str) -> Counter:
    words = caption_words(caption)
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _NGRAMS + 1) for start in range(len(words) - n + 1)
    )


def _similarity(said: Counter, reference: Counter, weights: dict, unseen: float) -> float:
    """The mean over n of CIDEr[n] of a caption and one reference."""
    lengths = [
        sum(count for ngram, count in counts.items() if len(ngram) == 1) for counts in (said, reference)
    ]
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * _SIGMA**2))
    dots, norms_said, norms_reference = ([0.0] * _NGRAMS for _ in range(3))
    for ngram, count in said.items():
        weight, n = weights.get(ngram, unseen), len(ngram) - 1
        norms_said[n] += (count * weight) ** 2
        dots[n] += min(count, reference[ngram]) * reference[ngram] * weight**2
    for ngram, count in reference.items():
        norms_reference[len(ngram) - 1] += (count * weights[ngram]) ** 2
    lengths_product = [math.sqrt(a * b) for a, b in zip(norms_said, norms_reference, strict=True)]
    cosines = [dot / norm if norm else 0.0 for dot, norm in zip(dots, lengths_product, strict=True)]
    return penalty * sum(cosines) / _NGRAMS
