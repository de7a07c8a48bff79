"""Which samples of the support a query is shown: drawn at random, the same for all, or the most alike."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from flamingo.fewshot.prompts import Sample
from flamingo.fewshot.rices import nearest
from flamingo.fewshot.scoring import identity
from flamingo.generation import Latents
from flamingo.training.processes import gather, rank, world_size

SELECT = ("random", "fixed", "rices")


class Shots:
    """Chooses the shots of queries; those of a query's own image are left out, and images that are broken.

    Args:
        support: where the shots come from.
        queries: all of the run.
        number: of shots a query.
        select: "random", "fixed" for the same ones in front of all queries, or "rices" for those that look
            most like the query, the most alike last.
        seed: of the choice, which depends on nothing else but the name of the query.
        latents: of the support's images, for "rices" and to tell which are broken.
        text_only: the shots are shown without their images, which may then be broken.
    """

    def __init__(
        self,
        support: Sequence[Sample],
        queries: Sequence[Sample],
        number: int,
        *,
        select: str,
        seed: int,
        latents: Latents,
        text_only: bool = False,
    ):
        self.support = support
        self.number = number
        self.select = select
        self.seed = seed
        self.latents = latents
        self.text_only = text_only
        self.reason = ""  # why an image of the support cannot be read
        if select == "fixed":
            (self.fixed,) = self._whole([self._drawn(str(seed), others(support, queries))])
        elif select == "rices":
            self.readable, self.keys = self._embeddings()

    def of(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """The shots of each query, in the order they are shown.

        Raises:
            ValueError: if there are too few whose image can be read.
        """
        if self.select == "fixed":
            return [self.fixed] * len(queries)
        if self.select == "rices":
            return [self._alike(query, embedding) for query, embedding in self._pairs(queries)]
        # The name in the seed: a query has the same shots in whatever order queries come.
        drawn = [self._drawn(f"{self.seed}/{query.id}", others(self.support, [query])) for query in queries]
        return self._whole(drawn)

    def _drawn(self, seed: str, places: list[int]) -> Iterator[Sample]:
        """Samples at these places, in a random order."""
        return (self.support[place] for place in random.Random(seed).sample(places, len(places)))

    def _whole(self, drawn: Sequence[Iterator[Sample]]) -> list[list[Sample]]:
        """The first of each order that are not broken."""
        chosen: list[list[Sample]] = [[] for _ in drawn]
        while True:
            new = [
                list(islice(order, self.number - len(shots)))
                for order, shots in zip(drawn, chosen, strict=True)
            ]
            if not any(new):
                break
            broken = iter(self._broken([shot for more in new for shot in more]))
            for shots, more in zip(chosen, new, strict=True):
                shots += [shot for shot in more if not next(broken)]
        for shots in chosen:
            self._expect_enough(len(shots))
        return chosen

    def _broken(self, shots: Sequence[Sample]) -> list[bool]:
        if self.text_only:
            return [False] * len(shots)
        return [error is not None for error in self._errors(shots)]

    def _errors(self, shots: Sequence[Sample]) -> list[str | None]:
        errors = self.latents.broken([shot.image for shot in shots])
        self.reason = self.reason or next((f" ({error})" for error in errors if error), "")
        return errors

    def _expect_enough(self, found: int) -> None:
        if found < self.number:
            raise ValueError(
                f"evaluate: expected {self.number} samples or more in the support whose image can be read, "
                f"got {found}{self.reason}. Mend the images, or show fewer shots."
            )

    def _embeddings(self) -> tuple[list[Sample], Tensor]:
        """The support that can be read, and the embedding of each; several processes share the work."""
        own = self.support[rank() :: world_size()]
        errors = self._errors(own)
        media = [sample.image for sample, error in zip(own, errors, strict=True) if error is None]
        found = gather((errors, self.latents.embeddings(media)))
        embedding_of: dict[int, Tensor] = {}
        for start, (errors, embeddings) in enumerate(found):
            places = range(start, len(self.support), world_size())
            readable = [place for place, error in zip(places, errors, strict=True) if error is None]
            embedding_of |= zip(readable, embeddings, strict=True)
        order = sorted(embedding_of)
        self._expect_enough(len(order))
        keys = torch.stack([embedding_of[place] for place in order])
        return [self.support[place] for place in order], keys

    def _pairs(self, queries: Sequence[Sample]) -> Iterable[tuple[Sample, Tensor]]:
        return zip(queries, self.latents.embeddings([query.image for query in queries]), strict=True)

    def _alike(self, query: Sample, embedding: Tensor) -> list[Sample]:
        places = others(self.readable, [query])
        self._expect_enough(len(places))
        chosen = nearest(embedding, self.keys[places], self.number).tolist()
        return [self.readable[places[place]] for place in chosen]


def others(support: Sequence[Sample], queries: Sequence[Sample]) -> list[int]:
    """Which of the support are not about the image of one of the queries."""
    own = {identity(query.image) for query in queries}
    return [place for place, sample in enumerate(support) if identity(sample.image) not in own]


def check_support(support: Sequence[Sample], queries: Sequence[Sample], shots: int, select: str) -> None:
    """Raises ValueError if the choice is unknown, or the support has too few samples for a query."""
    if select not in SELECT:
        raise ValueError(f"evaluate: expected select 'random', 'fixed' or 'rices', got {select!r}.")
    if shots < 0:
        raise ValueError(f"evaluate: expected 0 shots or more, got {shots}.")
    if select == "fixed":
        found = len(others(support, queries))
        if found < shots:
            raise ValueError(
                f"evaluate: expected {shots} samples or more in the support that are not about the image of "
                f"any query, got {found}."
            )
    about = Counter(identity(sample.image) for sample in support)
    for query in queries:
        if (left := len(support) - about[identity(query.image)]) < shots:
            raise ValueError(
                f"evaluate: expected {shots} samples or more in the support that are not about the image of "
                f"query {query.id}, got {left}."
            )
