"""Scores of candidates, or of samples, against which of them are right."""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flamingo.command_line import remedy


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
    labels = torch.as_tensor(labels)
    if len(set(labels.tolist())) != 2:
        raise ValueError(f"roc_auc: expected labels of both kinds, got only {sorted(set(labels.tolist()))}.")
    metric = _sklearn("roc_auc").roc_auc_score
    return float(metric(labels.numpy(), torch.as_tensor(scores).numpy()))


def _sklearn(metric: str) -> Any:
    try:
        return import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError(f"{metric}: needs scikit-learn. {remedy('evaluate')}") from error


def ndcg(scores: Sequence[float], relevances: Sequence[float]) -> float:
    """How well candidates are ranked of which several are right to some degree, as in the VisDial challenge.

    ::

        k = number of candidates with a relevance other than 0
        DCG(order) = sum over the places i = 1..k of relevance[order[i]] / log2(i + 1)
        NDCG = DCG(candidates by their scores) / DCG(candidates by their relevances)

    Args:
        scores: of the candidates; of equals the first ranks higher.
        relevances: of the candidates, 0 and more.

    Returns:
        A number in 0..1; papers print 100 times its mean.

    Raises:
        ValueError: if the two differ in length, a relevance is below 0, or no candidate is relevant.

    Source: visualdialog.org/challenge/2018#evaluation, and the challenge's starter code.

    >>> ndcg([-1.0, -2.0, -3.0], [0.0, 1.0, 0.5])
    0.4796...
    """
    if len(scores) != len(relevances) or not any(relevances) or min(relevances) < 0:
        raise ValueError(
            "ndcg: expected a score and a relevance of 0 or more for each candidate, and one above 0, got "
            f"{len(scores)} scores and {len(relevances)} relevances from {min(relevances, default=0)} to "
            f"{max(relevances, default=0)}."
        )
    k = sum(relevance != 0 for relevance in relevances)
    order = sorted(range(len(scores)), key=lambda place: -scores[place])  # stable
    reached = _dcg([relevances[place] for place in order[:k]])
    return reached / _dcg(sorted(relevances, reverse=True)[:k])


def _dcg(relevances: Sequence[float]) -> float:
    return sum(relevance / math.log2(place + 2) for place, relevance in enumerate(relevances))


def weighted_ap(
    positive: Sequence[float], others: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]
) -> float:
    """Average precision of weighted samples, by scikit-learn.

    Args:
        positive: scores of the samples that are right.
        others: scores of those that are wrong, in groups.
        weights: of the right ones, then of each group.

    Raises:
        ImportError: without scikit-learn.

    >>> weighted_ap([0.9, 0.2], [[0.5]], [[1.0, 1.0], [2.0]])
    0.75
    """
    scores = [*positive, *(score for group in others for score in group)]
    labels = [1] * len(positive) + [0] * (len(scores) - len(positive))
    flat = [weight for group in weights for weight in group]
    average_precision = _sklearn("weighted_ap").average_precision_score
    return float(average_precision(labels, scores, sample_weight=flat))
