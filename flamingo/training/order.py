"""In which order a dataset's samples come: a function of the seed alone, that can start anywhere.

::

    epoch      0                                1
    shards     [ 3 0 ] [ 1 4 ] [ 2 ]            [ 4 1 ] [ 0 2 ] [ 3 ]      shuffled, `at_once` to a group
    samples    [ 7 2 ... ] ...                                             of a group, shuffled together
    batches    | 0 | 1 | 2 | ...                                           across groups and epochs

A process takes its share of every batch, so that any number of processes sees the same batches.
"""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

from flamingo.training.bad import DataError
from flamingo.training.shards import Entry, entries


@lru_cache(maxsize=16)
def _listed(shard: str, changed: int) -> list[Entry]:
    return entries(shard)


class Position(NamedTuple):
    """How far a dataset has been read."""

    epoch: int = 0
    group: int = 0  # of shards, in this epoch
    sample: int = 0  # of the group, the next to come


class Draw(NamedTuple):
    """A sample's turn."""

    entry: Entry
    seed: str  # of all that is drawn for this sample in this turn


class SampleOrder:
    """The endless order of a dataset's samples.

    Args:
        shards: paths; their order does not matter.
        seed: of the shuffle.
        at_once: shards in a group. Only a group's table of contents is read at a time.

    Raises:
        ValueError: if there is no shard, or in a whole epoch no sample.
    """

    def __init__(self, shards: Sequence[str], *, seed: int, at_once: int):
        if not shards:
            raise ValueError("SampleOrder: expected shards, got none.")
        self.shards = sorted(shards)
        self.seed = seed
        self.at_once = at_once

    @property
    def identity(self) -> str:
        """The same for orders in which a position means the same sample, wherever the shards lie."""
        names = " ".join(os.path.basename(shard) for shard in self.shards)
        return hashlib.sha256(f"{self.seed} {self.at_once} {names}".encode()).hexdigest()

    def draws(self, position: Position) -> Iterator[tuple[Draw, Position]]:
        """Samples from a position on, each with the position after it."""
        for epoch in count(position.epoch):
            found = epoch == position.epoch and position != Position(epoch)
            for group, shards in enumerate(self._groups(epoch)):
                if Position(epoch, group + 1) <= position:
                    continue
                first = position.sample if (epoch, group) == position[:2] else 0
                listed = [entry for shard in shards for entry in entries(shard)]
                random.Random(f"{self.seed} {epoch} {group}").shuffle(listed)
                for sample in range(first, len(listed)):
                    found = True
                    draw = Draw(listed[sample], f"{self.seed} {epoch} {group} {sample}")
                    yield draw, Position(epoch, group, sample + 1)
            if not found:
                raise DataError(f"SampleOrder: expected samples in {', '.join(self.shards)}, got none.")

    def substitute(self, draw: Draw, attempt: int) -> Draw:
        """Some sample for one that cannot be read: a function of the draw and the number of the attempt.

        Raises:
            DataError: see `entries`.
        """
        seed = f"{draw.seed} {attempt}"
        chance = random.Random(seed)
        shard = chance.choice(self.shards)
        listed = _listed(shard, os.stat(shard).st_mtime_ns) or [draw.entry]
        return Draw(chance.choice(listed), seed)

    def _groups(self, epoch: int) -> list[list[str]]:
        shards = self.shards.copy()
        random.Random(f"{self.seed} {epoch}").shuffle(shards)
        return [shards[i : i + self.at_once] for i in range(0, len(shards), self.at_once)]

    def batches(
        self, size: int, position: Position, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[list[Draw], Position]]:
        """One process's share of each batch, with the position after the whole batch.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if size % world_size:
            raise ValueError(
                f"SampleOrder: expected a batch_size that {world_size} processes can share evenly, got "
                f"{size}."
            )
        share = size // world_size
        draws = self.draws(position)
        while True:
            batch = list(islice(draws, size))
            mine = [draw for draw, _ in batch[rank * share : (rank + 1) * share]]
            yield mine, batch[-1][1]
