"""Real handwritten digits, and what a document shows and says of them.

::

    captions     <image>Output: seven<EOC>                      the digit's own name
    questions    <image>Question: is it odd? Answer: yes<EOC>
    codes        <image>is two<EOC>                             a name drawn for this document
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flamingo.demo.words import ANSWERS, NAMES, QUESTIONS
from flamingo.fewshot import CAPTION, QUESTION, Sample, Template

Kind = Literal["captions", "questions", "codes"]

TEMPLATES: dict[Kind, Template] = {"captions": CAPTION, "questions": QUESTION, "codes": Template("is")}
CANDIDATES: dict[Kind, tuple[str, ...]] = {"captions": NAMES, "questions": ANSWERS, "codes": NAMES}
WAYS = 4  # different digits of a document with codes
HELD_OUT = 397
MEAN, STD = (0.3053,) * 3, (0.3763,) * 3


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Attributes:
        images: float32 `[N, 3, 8, 8]` in 0..1, grey.
        labels: int64 `[N]`, 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def draw(self, digit: int, generator: torch.Generator) -> Tensor:
        """A random image of a digit."""
        places = (self.labels == digit).nonzero()[:, 0]
        return self.images[places[torch.randint(len(places), (), generator=generator)]]


def load_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """scikit-learn's 1797 digits, those for training and 397 others.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])


def episode(
    kind: Kind, digits: Digits, shots: int, generator: torch.Generator
) -> tuple[Sample, list[Sample]]:
    """A digit that something is asked about, and others with their answers.

    Args:
        kind: what is asked. Codes are names drawn for this episode, of four digits alone, so that the one
            that is asked has mostly been shown.
        digits: where images are taken from.
        shots: how many have answers.
        generator: of all that is drawn.

    Returns:
        The query, with its answer, and the shots.
    """
    ways = torch.randperm(10, generator=generator)[: WAYS if kind == "codes" else 10]
    names = torch.randperm(10, generator=generator) if kind == "codes" else torch.arange(10)
    samples = []
    for digit in ways[torch.randint(len(ways), (shots + 1,), generator=generator)].tolist():
        question, is_true = list(QUESTIONS.items())[torch.randint(len(QUESTIONS), (), generator=generator)]
        answer = ANSWERS[is_true(digit)] if kind == "questions" else NAMES[names[digit]]
        image = digits.draw(digit, generator)
        samples.append(Sample(image=image, fields={"question": question}, answer=answer))
    return samples[-1], samples[:-1]
