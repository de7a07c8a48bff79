"""What few-shot results are measured by.

vqa       short answers: VQA accuracy, OK-VQA's stems, iVQA
captions  CIDEr
ranking   top-1 accuracy, ROC AUC, NDCG, weighted average precision
actions   RareAct's mWAP
words     WUPS, by WordNet
"""

from flamingo.fewshot.metrics.actions import Action, mean_weighted_ap
from flamingo.fewshot.metrics.captions import caption_words, cider
from flamingo.fewshot.metrics.ranking import ndcg, roc_auc, top_one, weighted_ap
from flamingo.fewshot.metrics.vqa import (
    answer_matches,
    ivqa_accuracy,
    normalise_answer,
    open_flamingo_accuracy,
    stem,
    stem_accuracy,
    vqa_accuracy,
)
from flamingo.fewshot.metrics.words import load_words, wups

__all__ = [
    "Action",
    "answer_matches",
    "caption_words",
    "cider",
    "ivqa_accuracy",
    "load_words",
    "mean_weighted_ap",
    "ndcg",
    "normalise_answer",
    "open_flamingo_accuracy",
    "roc_auc",
    "stem",
    "stem_accuracy",
    "top_one",
    "vqa_accuracy",
    "weighted_ap",
    "wups",
]
