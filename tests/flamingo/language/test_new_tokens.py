"""Tokens that learn while all around them is frozen."""

import pytest
import torch
from torch import nn

from flamingo import LanguageModel, NewTokens
from tests.helpers.weights import randomise

IDS = torch.tensor([[1, 7, 2, 9, 3]])


def language(**options):
    model = LanguageModel(vocab_size=10, dim=8, layers=1, heads=2, new_tokens=[9, 7], **options)
    return randomise(model)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_only_the_new_learn(tie_embeddings):
    model = language(tie_embeddings=tie_embeddings).freeze()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.5)
    for _ in range(2):
        logits = model(IDS)[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), IDS[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {"new_tokens.embedding", *([] if tie_embeddings else ["new_tokens.head"])}
    assert all(
        (parameter != before[name]).all() for name, parameter in model.named_parameters() if name in changed
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_it_is_as_if_the_rows_were_in_the_matrices(tie_embeddings):
    model = language(tie_embeddings=tie_embeddings)
    whole = LanguageModel(vocab_size=10, dim=8, layers=1, heads=2, tie_embeddings=tie_embeddings)
    whole.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        whole.embedding.weight[[9, 7]] = model.new_tokens.embedding
        if not tie_embeddings:
            whole.head.weight[[9, 7]] = model.new_tokens.head
    torch.testing.assert_close(model(IDS), whole(IDS))
    others = [id for id in range(10) if id not in (7, 9)]
    assert torch.equal(model(IDS)[..., others], whole(IDS)[..., others])


def test_beyond_the_vocabulary():
    matrix = torch.randn(5, 4)
    tokens = NewTokens([6, 2, 5], matrix)
    assert tokens.vocab_size == 7
    assert tokens.stand_in(torch.tensor([4, 5, 6, 2])).tolist() == [4, 0, 0, 2]
    ids = torch.arange(7)
    x = tokens.embed(ids, matrix[tokens.stand_in(ids)])
    assert torch.equal(x[[0, 1, 3, 4]], matrix[[0, 1, 3, 4]])
    assert torch.equal(x[[6, 2, 5]], tokens.embedding)
    logits = tokens.add_logits(x, x @ matrix.T)
    torch.testing.assert_close(logits, x @ x.T)


def test_they_start_as_large_as_the_others():
    tokens = NewTokens(range(1000, 1400), 3 * torch.randn(1000, 50), torch.randn(1000, 50))
    assert tokens.embedding.std().item() == pytest.approx(3, rel=0.05)
    assert tokens.head.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("ids", [[1, 1], [-1], [6], [5, 7]])
def test_ids_that_do_not_fit(ids):
    with pytest.raises(ValueError, match=r"different ids below 5, .* or continuing them, got \["):
        NewTokens(ids, torch.randn(5, 4))


def test_a_half_precision_model():
    tokens = NewTokens([5], torch.randn(5, 4))
    matrix = torch.randn(5, 4, dtype=torch.bfloat16)
    x = tokens.embed(torch.tensor([1, 5]), matrix[[1, 0]])
    assert (x.dtype, tokens.add_logits(x, x @ matrix.T).dtype) == (torch.bfloat16, torch.bfloat16)
