"""The few words of the demo, and text made of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What lists are about. The language model never reads about digits, so none of these is one.
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


def lists(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Texts in which nouns are given numbers and, said again, keep them: int64 `[count, 1 + 4 * length]`.

    ::

        <BOS> lamp is nine <EOC> river is two <EOC> lamp is nine <EOC> ...

    Every text has 2 to 8 nouns of its own, with numbers drawn for it.
    """
    tokenizer = WordTokenizer()
    nouns = torch.rand(count, len(NOUNS), generator=generator).argsort(dim=1)[:, :8]
    numbers = torch.randint(len(NAMES), (count, 8), generator=generator)
    different = torch.randint(2, 9, (count, 1), generator=generator)
    said = (torch.rand(count, length, generator=generator) * different).long()
    first_noun, first_name = tokenizer.encode(f"{NOUNS[0]} {NAMES[0]}")
    (is_id,) = tokenizer.encode("is")
    items = [
        nouns.gather(1, said) + first_noun,
        is_id,
        numbers.gather(1, said) + first_name,
        tokenizer.eoc_id,
    ]
    columns = [torch.as_tensor(item).expand(count, length) for item in items]
    text = torch.stack(columns, dim=-1).flatten(1)
    return torch.cat((torch.full((count, 1), tokenizer.bos_id), text), dim=1)


def facts(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Texts about what is true of numbers: int64 `[count, 1 + 7 * length]`.

    ::

        <BOS> Question: is nine odd? Answer: yes <EOC> Question: is two large? Answer: no <EOC> ...
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
    text = every[torch.randint(len(every), (count, length), generator=generator)].flatten(1)
    return torch.cat((torch.full((count, 1), tokenizer.bos_id), text), dim=1)
