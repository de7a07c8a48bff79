"""The demo's tokenizer and texts, and what in them is known from the words before."""

import pytest
import torch

from flamingo.demo.words import NAMES, NOUNS, WordTokenizer, facts, lists, pairs, repeats

TRUE = {
    "even?": {0, 2, 4, 6, 8},
    "odd?": {1, 3, 5, 7, 9},
    "small?": {0, 1, 2, 3, 4},
    "large?": {5, 6, 7, 8, 9},
}


def generator():
    return torch.Generator().manual_seed(0)


def words_of(ids):
    return [WordTokenizer.words[id] for id in ids.tolist()]


def test_tokenizer():
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("lamp is nine<EOC><image>")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == "lamp is nine <EOC> <image>"
    assert len(set(tokenizer.words)) == tokenizer.vocab_size
    with pytest.raises(ValueError, match="expected words of the demo, got 'dog'"):
        tokenizer.encode("dog is nine")


def test_repeats_are_known_after_the_first_round():
    texts = repeats(100, 32, generator())
    assert texts.ids.shape == texts.known.shape == (100, 32)
    rounds, said = (~texts.known).sum(dim=1).tolist(), []
    assert set(rounds) == {3, 4, 5, 6, 7, 8}
    for ids, known, length in zip(texts.ids, texts.known, rounds, strict=True):
        assert known[length:].all()
        assert torch.equal(ids[length:], ids[:-length])
        said += words_of(ids[:length])
    assert {"is"} < set(said) <= {"is", *NAMES, *NOUNS}
    assert 0.2 < said.count("is") / len(said) < 0.4
    assert len(set(said)) > 60


@pytest.mark.parametrize(("texts", "item"), [(pairs, 2), (lists, 4)])
def test_a_noun_keeps_its_number_and_it_is_known_from_then_on(texts, item):
    drawn, again, numbers = texts(50, 9, generator()), 0, set()
    begins = item == 4  # with <BOS>
    assert drawn.ids.shape == drawn.known.shape == (50, begins + 9 * item)
    for ids, known in zip(drawn.ids, drawn.known.tolist(), strict=True):
        words, told = words_of(ids), {}
        if begins:
            assert words[0] == "<BOS>"
            assert words[2::4] == ["is"] * 9
            assert words[4::4] == ["<EOC>"] * 9
        places = range(begins, len(words), item)
        expected = [False] * len(words)
        for place in places:
            noun, number = words[place], words[place + item // 2]
            assert noun in NOUNS
            assert number in NAMES
            expected[place + item // 2] = noun in told
            assert told.setdefault(noun, number) == number
        assert known == expected
        assert 1 <= len(told) <= 8
        again += 9 - len(told)
        numbers |= set(told.items())
    assert again > 50
    assert len(numbers) > 2 * len({noun for noun, _ in numbers}), (
        "a noun has a number of its own in every text"
    )


def test_facts_are_true_and_their_answers_known():
    texts, asked = facts(50, 5, generator()), set()
    assert texts.ids.shape == texts.known.shape == (50, 36)
    for ids, known in zip(texts.ids, texts.known, strict=True):
        for fact in WordTokenizer().decode(ids).split(" <EOC>")[:-1]:
            question, is_, name, word, answer, said = fact.split()
            assert (question, is_, answer) == ("Question:", "is", "Answer:")
            assert said == ("yes" if NAMES.index(name) in TRUE[word] else "no")
            asked.add((name, word))
        assert words_of(ids[known]) == words_of(ids[6::7])
        assert set(words_of(ids[known])) <= {"no", "yes"}
    assert len(asked) == 40
