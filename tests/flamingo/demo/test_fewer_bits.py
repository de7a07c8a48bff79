"""What fewer bits cost a Flamingo that was trained: the answers, and how far its logits move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from flamingo.demo import run, stages
from flamingo.demo.digits import CANDIDATES, TEMPLATES, episode, load_digits
from flamingo.fewshot import log_likelihoods
from flamingo_kernels import patch, quantize

# A thousand questions: kind, shots, how many.
ASKED = (("captions", 0, 400), ("captions", 4, 200), ("questions", 4, 200), ("codes", 8, 200))


def questions(digits, kind, shots, count):
    generator = torch.Generator().manual_seed(7)
    drawn = [episode(kind, digits, shots, generator) for _ in range(count)]
    return [TEMPLATES[kind].prompt(query, before) for query, before in drawn]


def scores(model, digits) -> list[torch.Tensor]:
    """Of every candidate, for every question."""
    return [
        log_likelihoods(
            model,
            stages.make_processor(),
            questions(digits, kind, shots, count),
            CANDIDATES[kind],
            closed=False,
            batch_size=100,
        )
        for kind, shots, count in ASKED
    ]


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn")
    _, model = run.run()
    return model.eval(), load_digits()[1]


def in_integers(model):
    patch(model)
    quantize(model, vision=True, keep=False)
    return model


def patched(model):
    patch(model)
    return model


CHANGES = {
    "integers": in_integers,
    "bfloat16": lambda model: model.bfloat16(),
    "bfloat16, patched": lambda model: patched(model.bfloat16()),
    "float16": lambda model: model.half(),
    "integers in bfloat16": lambda model: in_integers(model.bfloat16()),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_trained_model_answers_alike(change, trained):
    model, digits = trained
    before = scores(model, digits)
    after = [each.float() for each in scores(CHANGES[change](copy.deepcopy(model)), digits)]
    others = sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in zip(before, after, strict=True))
    divergence = sum(
        float(F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="sum", log_target=True))
        for a, b in zip(before, after, strict=True)
    ) / sum(count for *_, count in ASKED)
    print(f"{change}: {others} of 1000 answers differ, KL of the candidates {divergence:.1e}")
    assert others <= 10
    assert divergence < 1e-2
