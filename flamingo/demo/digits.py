"""Real handwritten digits, and documents that show some of them and say what they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flamingo.demo.words import NAMES
from flamingo.fewshot import Sample, Template

TEMPLATE = Template("is")
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


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """scikit-learn's 1797 digits, those for training and 397 others.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])


def episode(
    digits: Digits, shots: int, generator: torch.Generator, *, codes: bool
) -> tuple[Sample, list[Sample]]:
    """One digit to be named, and others that are named before it.

    Args:
        digits: where images are taken from.
        shots: how many come before.
        generator: of all that is drawn.
        codes: call the digits by names that are drawn for this episode, and take them from four alone, so
            that the one that is asked has mostly been shown; otherwise by their own names.

    Returns:
        The query and the shots.
    """
    ways = torch.randperm(10, generator=generator)[: WAYS if codes else 10]
    names = torch.randperm(10, generator=generator) if codes else torch.arange(10)
    drawn = ways[torch.randint(len(ways), (shots + 1,), generator=generator)].tolist()
    samples = [Sample(image=digits.draw(digit, generator), answer=NAMES[names[digit]]) for digit in drawn]
    return samples[-1], samples[:-1]


def prompt(query: Sample, shots: list[Sample], *, codes: bool) -> list:
    """The document that asks for the query; its first word says whether the names are the digits' own."""
    return ["codes" if codes else "digits", *TEMPLATE.prompt(query, shots)]
