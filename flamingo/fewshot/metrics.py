"""What few-shot results are measured by."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

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


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How many annotators agree with a prediction, three being enough.

    ::

        mean over annotators i of min(1, (others than i who said the prediction) / 3)

    Both sides are normalised. The official script does not normalise answers on which all annotators agree:
    with it "t-shirt" is never right there, as the prediction alone becomes "t shirt".

    Args:
        prediction: the model's answer.
        answers: of the annotators; 10 in VQAv2.

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
    said = normalise_answer(prediction)
    agrees = [normalise_answer(answer) == said for answer in answers]
    total = sum(agrees)
    return sum(min(1.0, (total - agree) / 3) for agree in agrees) / len(agrees)


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


def top_one(scores: Tensor, targets: Sequence[int] | Tensor) -> float:
    """The share of samples whose best candidate is the right one.

    Args:
        scores: `[N, C]`, as `log_likelihoods` makes them; of equals the first is taken.
        targets: N indices of candidates.

    Raises:
        ValueError: without samples, or if the two differ in length.

    >>> top_one(torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -9.0]]), [0, 1, 1])
    0.6666666666666666
    """
    targets = torch.as_tensor(targets)
    if not len(scores) or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"top_one: expected scores (N, C) and N targets, got {tuple(scores.shape)} and "
            f"{tuple(targets.shape)}."
        )
    hits = scores.argmax(dim=1).cpu() == targets.cpu()
    return int(hits.sum()) / len(hits)


def roc_auc(scores: Sequence[float] | Tensor, labels: Sequence[int] | Tensor) -> float:
    """Area under the ROC curve: how often a positive sample scores above a negative one, by scikit-learn.

    Args:
        scores: N numbers; for yes or no, the log-likelihood of yes less that of no.
        labels: N of 0 or 1.

    Raises:
        ImportError: without scikit-learn.
        ValueError: if all labels are equal.

    >>> roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(
            "roc_auc: needs scikit-learn: pip install scikit-learn, or "
            'pip install "flamingo-kernels[evaluate]".'
        ) from error
    labels = torch.as_tensor(labels)
    if len(set(labels.tolist())) != 2:
        raise ValueError(f"roc_auc: expected labels of both kinds, got only {sorted(set(labels.tolist()))}.")
    return float(roc_auc_score(labels.numpy(), torch.as_tensor(scores).numpy()))
