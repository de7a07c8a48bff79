"""What is profiled: a model, what it is fed, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PREFILL, DECODE, GENERATION, STEP = WORKS = ("prefill", "decode", "generation", "training step")
INFERENCE = (PREFILL, DECODE)


class Sizes(NamedTuple):
    """The inputs: `batch` sequences of `text` tokens and `media` images, and `new` tokens to generate."""

    text: int
    media: int
    batch: int = 1
    new: int = 0


FULL, QUICK = Sizes(text=1024, media=8), Sizes(text=48, media=3)


class Work(NamedTuple):
    """One kind of work.

    Attributes:
        start: prepares a model, in whatever dtype it is, and returns the call that is timed. It gives logits,
            new tokens, or in a training step the loss, which its caller differentiates.
        tokens: how many one call handles.
        note: what a reader of the row must know.
    """

    start: Callable[[Any], Callable[[], Tensor]]
    tokens: int
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """A model with random weights and gates well off 0, and what is done with it.

    Attributes:
        model: what is trained in it requires gradients, the rest does not.
        inputs: by name, to be shown.
        parts: regular expressions for the paths of modules, and the part of the model that those are.
        works: of `WORKS`; GENERATION where new tokens are asked for.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    parts: dict[str, str]
    works: dict[str, Work]


class Plan(NamedTuple):
    """A model that is still to be built.

    Attributes:
        needs_memory: whether numbers are read while it is built, so tensors without memory cannot stand in.
    """

    name: str
    sizes: Sizes
    build: Callable[[Sizes], Subject]
    needs_memory: bool = False

    def only(self, works: Iterable[str]) -> Plan:
        """The same with these kinds of work alone. Raises ValueError if there is none of that name."""
        names = list(works)
        for name in names:
            if name not in WORKS:
                raise ValueError(f"expected one of {', '.join(WORKS)}, got {name!r}.")
        return self._replace(build=partial(_only, self.build, names))

    def subject(self, dtype: torch.dtype, device: str) -> Subject:
        """The same numbers in every dtype, up to its rounding."""
        torch.manual_seed(0)
        with torch.device(device):
            subject = self.build(self.sizes)
        convert(subject.model, dtype)
        return subject


def _only(build: Callable[[Sizes], Subject], names: list[str], sizes: Sizes) -> Subject:
    whole = build(sizes)
    works = {name: work for name, work in whole.works.items() if name in names}
    if not works:
        raise ValueError(f"expected one of {', '.join(whole.works)}, got {', '.join(names)}.")
    return replace(whole, works=works)


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, but every tensor stays the object it is: a twin that shares it follows."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def tokens(sizes: Sizes, vocabulary: int, image: int) -> Tensor:
    """Random text `[B, T]` with images at even distances, the first behind a token that sees none."""
    ids = torch.randint(vocabulary, (sizes.batch, sizes.text))
    ids[:, 1 + torch.arange(sizes.media) * (sizes.text // sizes.media)] = image
    return ids


def features(*shape: int) -> Tensor:
    """Random numbers that every dtype can hold."""
    return torch.randn(shape).bfloat16().float()
