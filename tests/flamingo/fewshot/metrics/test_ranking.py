"""Rankings against numbers worked out by hand."""

import math
import sys

import pytest
import torch

from flamingo.fewshot.metrics import ndcg, roc_auc, top_one, weighted_ap


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
        with pytest.raises(ImportError, match=r'needs scikit-learn\. .* pip install "\.\[evaluate\]"'):
            roc_auc([0.1, 0.2], [0, 1])
        with pytest.raises(ImportError, match=r"needs scikit-learn"):
            weighted_ap([0.5], [[0.1]], [[1.0], [1.0]])


class TestNDCG:
    """Gains are divided by log2(2), log2(3), log2(4) ... from the first place on."""

    def test_by_hand(self):
        # Three are relevant, so three places count: the order is 1, 0, 3, and at best it were 1, 2, 0.
        scores, relevances = [-2.0, -1.0, -9.0, -3.0], [0.2, 1.0, 0.6, 0.0]
        reached = 1.0 / math.log2(2) + 0.2 / math.log2(3) + 0.0 / math.log2(4)
        best = 1.0 / math.log2(2) + 0.6 / math.log2(3) + 0.2 / math.log2(4)
        assert ndcg(scores, relevances) == pytest.approx(reached / best)

    def test_of_equal_scores_the_first_ranks_higher(self):
        assert ndcg([0.0, 0.0], [1.0, 0.0]) == 1
        assert ndcg([0.0, 0.0], [0.0, 1.0]) == 0  # only one place counts

    @pytest.mark.parametrize(
        ("scores", "relevances", "found"),
        [
            ([0.1], [0.0], "1 scores and 1 relevances from 0.0 to 0.0"),
            ([0.1], [1.0, 1.0], "1 scores and 2"),
            ([0.1, 0.2], [1.0, -1.0], "relevances from -1.0 to 1.0"),
        ],
    )
    def test_errors(self, scores, relevances, found):
        with pytest.raises(ValueError, match=found):
            ndcg(scores, relevances)


def test_weighted_average_precision():
    pytest.importorskip("sklearn")
    # In order: right 1, wrong 2, right 3. Precision 1/1 at the first quarter of the weight of what is right
    # and (1 + 3) / (1 + 2 + 3) at the rest of it.
    found = weighted_ap([0.9, 0.1], [[], [0.5]], [[1.0, 3.0], [], [2.0]])
    assert found == pytest.approx(1 / 4 * 1 + 3 / 4 * 4 / 6)
