"""Beam search over chains of tokens, against the same search in plain Python."""

import pytest
import torch

from flamingo.generation import beam_search

VOCABULARY = 7


class Chain:
    """A context whose next token depends on the last one alone."""

    length = 0

    def __init__(self, table, batch):
        self.table = table  # [V, V]
        self.attention_mask = torch.ones(batch, 1, dtype=torch.bool)
        self.added = []

    def reorder(self, rows):
        self.attention_mask = self.attention_mask[rows]

    def add(self, tokens, mask=None):
        self.added.append((tokens, mask))

    def step(self):
        return self.table[self.added[-1][0][:, -1]]

    def crop(self, length):
        assert length == 0


def plainly(first, table, *, num_beams, longest, stops, penalty):
    """The best text: every candidate in the order of its likelihood, those of the first num_beams that end
    compared, the next num_beams that do not end kept."""
    best, best_worth, beams = None, -float("inf"), [((), 0.0)]
    for length in range(1, longest + 1):
        every = [
            ((*text, token), worth + log_p)
            for text, worth in beams
            for token, log_p in enumerate((table[text[-1]] if text else first).log_softmax(dim=-1).tolist())
        ]
        every.sort(key=lambda each: -each[1])
        for text, likelihood in every[:num_beams]:
            if (length == longest or text[-1] in stops) and likelihood / length**penalty > best_worth:
                best, best_worth = text, likelihood / length**penalty
        beams = [each for each in every if each[0][-1] not in stops][:num_beams]
    return list(best)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize("stops", [[], [2], [1, 2, 4]], ids=str)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_finds_what_plain_python_finds(num_beams, stops, penalty):
    """Stops are likely, so that all the best candidates of a step may end at once."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        table = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        first = 2 * torch.randn(2, VOCABULARY, generator=generator)
        table[:, stops] += 2
        first[:, stops] += seed % 3
        context = Chain(table, batch=2)
        found = beam_search(
            context,
            first,
            num_beams=num_beams,
            max_new_tokens=5,
            stop_token_ids=stops,
            length_penalty=penalty,
        )
        tokens, mask = context.added[-1]
        assert torch.equal(tokens, found)
        for row in range(2):
            text = plainly(first[row], table, num_beams=num_beams, longest=5, stops=stops, penalty=penalty)
            assert found[row][mask[row]].tolist() == text
            assert set(found[row, len(text) :].tolist()) <= {text[-1]}
