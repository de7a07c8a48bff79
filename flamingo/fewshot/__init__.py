"""Few-shot evaluation as in the paper (arXiv 2204.14198, section 3 and appendix B.1.4).

prompts     samples to documents, with the paper's templates
scoring     closed-ended tasks: the log-likelihood of each candidate
rices       shots that look like the query
metrics     VQA accuracy, CIDEr, NDCG, WUPS and the others
shots       which samples a query is shown
runner      a model over a dataset
records     its answers in a file, resumed where a run was killed
benchmarks  the paper's sixteen, ImageNet and Kinetics, on disk
inputs      what an evaluation reads
results     what a run leaves besides its answers
command     `python -m flamingo evaluate`
"""

from flamingo.fewshot.benchmarks import BENCHMARKS, Benchmark, read_captions, read_vqa
from flamingo.fewshot.benchmarks.captions import CAPTIONS
from flamingo.fewshot.benchmarks.questions import VQA
from flamingo.fewshot.metrics import cider, roc_auc, top_one, vqa_accuracy
from flamingo.fewshot.prompts import (
    ACTION,
    CAPTION,
    CLASSIFICATION,
    HATEFUL_MEMES,
    QUESTION,
    VISUAL_DIALOGUE,
    Sample,
    Template,
    conversation,
    dialogue_history,
    trim,
)
from flamingo.fewshot.rices import image_embeddings, nearest
from flamingo.fewshot.runner import Evaluation, Task, evaluate
from flamingo.fewshot.scoring import ensemble_log_likelihoods, log_likelihoods

__all__ = [
    "ACTION",
    "BENCHMARKS",
    "CAPTION",
    "CAPTIONS",
    "CLASSIFICATION",
    "HATEFUL_MEMES",
    "QUESTION",
    "VISUAL_DIALOGUE",
    "VQA",
    "Benchmark",
    "Evaluation",
    "Sample",
    "Task",
    "Template",
    "cider",
    "conversation",
    "dialogue_history",
    "ensemble_log_likelihoods",
    "evaluate",
    "image_embeddings",
    "log_likelihoods",
    "nearest",
    "read_captions",
    "read_vqa",
    "roc_auc",
    "top_one",
    "trim",
    "vqa_accuracy",
]
