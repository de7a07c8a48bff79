"""The few words of the demo, and text made of them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What numbers are given to. The language model never reads about digits, so none of these is one.
NOUNS = (
    *("acorn", "anchor", "apple", "arrow", "badge", "barrel", "basket", "beetle", "bell", "bench"),
    *("blanket", "boat", "bottle", "branch", "bridge", "broom", "bucket", "button", "cabin", "candle"),
    *("carpet", "castle", "chair", "cherry", "clock", "cloud", "coat", "comet", "cradle", "curtain"),
    *("desk", "door", "drum", "engine", "feather", "fence", "flag", "flower", "forest", "garden"),
    *("glove", "hammer", "harbour", "helmet", "island", "kettle", "ladder", "lamp", "lantern", "letter"),
    *("mirror", "mountain", "needle", "orchard", "pencil", "pillow", "river", "saddle", "shovel", "window"),
)


# What is asked about a digit.
QUESTIONS = {
    "is it even?": lambda digit: digit % 2 == 0,
    "is it odd?": lambda digit: digit % 2 == 1,
    "is it small?": lambda digit: digit < 5,
    "is it large?": lambda digit: digit >= 5,
}
ANSWERS = ("no", "yes")


class WordTokenizer:
    """One id a word, for the words above and those of the documents.

    >>> tokenizer = WordTokenizer()
    >>> tokenizer.decode(tokenizer.encode("lamp is nine<EOC>"))
    'lamp is nine <EOC>'
    """

    image_id, eoc_id, pad_id, bos_id, eos_id = range(5)
    words = (
        *("<image>", "<EOC>", "<PAD>", "<BOS>", "<EOS>", "is", "it", "Output:", "Question:", "Answer:"),
        *(question.split()[-1] for question in QUESTIONS),
        *(*ANSWERS, *NAMES, *NOUNS),
    )
    vocab_size = len(words)

    def __init__(self):
        self._ids = {word: id for id, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Words, with spaces or special tokens between them, to ids.

        Raises:
            ValueError: for a word it does not know.
        """
        words = text.replace("<EOC>", " <EOC> ").replace("<image>", " <image> ").split()
        if unknown := [word for word in words if word not in self._ids]:
            raise ValueError(f"WordTokenizer: expected words of the demo, got {unknown[0]!r}.")
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to words, without padding, `<BOS>` and `<EOS>`."""
        hidden = (self.pad_id, self.bos_id, self.eos_id)
        return " ".join(self.words[id] for id in map(int, ids) if id not in hidden)


class Text(NamedTuple):
    """Texts of one length."""

    ids: Tensor  # int64 [count, T]
    known: Tensor  # bool [count, T], True at words that follow from those before them


def repeats(count: int, length: int, generator: torch.Generator) -> Text:
    """Texts that say 3 to 8 words over and over: `[count, length]`.

    ::

        lamp is nine is river lamp is nine is river lamp is ...

    Known is every word after the first round. The words are nouns and numbers, but three of ten are "is":
    what follows one of these only the word before it tells, as in lists.
    """
    is_id, first = WordTokenizer().encode(f"is {NAMES[0]}")
    words = torch.randint(first, first + len(NAMES) + len(NOUNS), (count, 8), generator=generator)
    words[torch.rand(count, 8, generator=generator) < 0.3] = is_id
    round_ = torch.randint(3, 9, (count, 1), generator=generator)
    places = torch.arange(length).expand(count, length)
    return Text(words.gather(1, places % round_), places >= round_)


def pairs(count: int, length: int, generator: torch.Generator) -> Text:
    """Texts in which nouns are given numbers and, said again, keep them: `[count, 2 * length]`.

    ::

        lamp nine river two lamp nine ...

    Known is the number of a noun that was said before.
    """
    nouns, numbers, again = _numbered(count, length, generator)
    return Text(_side_by_side(nouns, numbers), _side_by_side(False, again))


def lists(count: int, length: int, generator: torch.Generator) -> Text:
    """Pairs as sentences: `[count, 1 + 4 * length]`.

    ::

        <BOS> lamp is nine <EOC> river is two <EOC> lamp is nine <EOC> ...
    """
    (is_id,) = WordTokenizer().encode("is")
    nouns, numbers, again = _numbered(count, length, generator)
    ids = _side_by_side(nouns, is_id, numbers, WordTokenizer.eoc_id)
    return _begun(Text(ids, _side_by_side(False, False, again, False)))


def facts(count: int, length: int, generator: torch.Generator) -> Text:
    """Texts about what is true of numbers: `[count, 1 + 7 * length]`.

    ::

        <BOS> Question: is nine odd? Answer: yes <EOC> Question: is two large? Answer: no <EOC> ...

    Known are the answers.
    """
    tokenizer = WordTokenizer()
    every = torch.tensor(
        [
            tokenizer.encode(
                f"Question: {question.replace('it', name)} Answer: {ANSWERS[is_true(digit)]}<EOC>"
            )
            for question, is_true in QUESTIONS.items()
            for digit, name in enumerate(NAMES)
        ]
    )
    ids = every[torch.randint(len(every), (count, length), generator=generator)].flatten(1)
    is_answer = torch.arange(every.shape[1]) == 5
    return _begun(Text(ids, is_answer.repeat(count, length)))


def _numbered(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Nouns, their numbers, and whether a noun was said before: `[count, length]` each.

    Every text has 2 to 8 nouns of its own, with numbers drawn for it.
    """
    first_noun, first_name = WordTokenizer().encode(f"{NOUNS[0]} {NAMES[0]}")
    nouns = torch.rand(count, len(NOUNS), generator=generator).argsort(dim=1)[:, :8]
    numbers = torch.randint(len(NAMES), (count, 8), generator=generator)
    different = torch.randint(2, 9, (count, 1), generator=generator)
    said = (torch.rand(count, length, generator=generator) * different).long()
    again = (said[:, :, None] == said[:, None, :]).tril(diagonal=-1).any(dim=-1)
    return nouns.gather(1, said) + first_noun, numbers.gather(1, said) + first_name, again


def _side_by_side(*columns: Tensor | int) -> Tensor:
    """`[count, length]` each, or one word for all, to `[count, len(columns) * length]`."""
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, columns)), dim=-1).flatten(1)


def _begun(text: Text) -> Text:
    """The same after `<BOS>`."""
    return Text(F.pad(text.ids, (1, 0), value=WordTokenizer.bos_id), F.pad(text.known, (1, 0), value=False))
