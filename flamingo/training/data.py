"""The batches of a dataset, in the order of its samples, decoded by worker processes ahead of their use."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from flamingo.processor import Batch, Processor
from flamingo.training.config import DatasetConfig, Documents
from flamingo.training.order import Draw, Position, SampleOrder
from flamingo.training.samples import to_document
from flamingo.training.shards import find_shards


def collate(config: DatasetConfig, processor: Processor, draws: list[Draw]) -> Batch:
    """Reads samples and makes a batch of them; the same for the same draws, wherever it runs."""
    documents, sees_next = [], []
    for entry, seed in draws:
        draw = random.Random(seed)
        try:
            documents.append(to_document(config, entry.read(), processor.tokenizer.encode, draw))
        except ValueError as error:
            raise ValueError(f"{entry.shard}, sample {entry.key}: {error}") from error
        sees_next.append(float(isinstance(config, Documents) and draw.random() < config.p_next))
    return processor(documents, p_next=sees_next)


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in pieces of `size` documents; whole for None."""
    rows = len(batch.labels)
    size = size or rows
    for start in range(0, rows, size):
        place = slice(start, start + size)
        yield Batch._make(None if field is None else field[place] for field in batch)


def count_targets(batch: Batch) -> int:
    """How many tokens are learned; a document's first is not, as nothing comes before it."""
    return int((batch.labels[:, 1:] != -100).sum())


class Stream:
    """An endless iterator over a dataset's batches that knows its position.

    Args:
        config: of the dataset.
        processor: of documents.
        seed, at_once: see `SampleOrder`.
        state: of a `Stream` that this one continues, None for the beginning.
        rank, world_size: this process takes its share of each batch.
        workers: processes that read ahead; they change when batches are made, not which.
        pin_memory: for faster copies to a GPU.

    Attributes:
        state: after the last batch that was taken, not the last that was read ahead.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if the state is of other shards, another seed or another `at_once`.
    """

    def __init__(
        self,
        config: DatasetConfig,
        processor: Processor,
        *,
        seed: int,
        at_once: int,
        state: Mapping[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        order = SampleOrder(find_shards(config.shards), seed=seed, at_once=at_once)
        position = Position(*state["position"]) if state else Position()
        if state and state["order"] != order.identity:
            raise ValueError(
                f"Stream: expected the shards, the seed and shards_at_once of the checkpoint for dataset "
                f"{config.name!r}, got others. Take those again, or another folder for another run."
            )
        self.state: dict[str, Any] = {"order": order.identity, "position": tuple(position)}
        self._batches: Iterator[tuple[Batch, Position]] = iter(
            DataLoader(
                _Batches(config, processor),
                sampler=order.batches(config.batch_size, position, rank=rank, world_size=world_size),
                batch_size=None,  # an item is a batch
                num_workers=workers,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # the loader draws from it, and not from the run's
            )
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        batch, position = next(self._batches)
        self.state = {**self.state, "position": tuple(position)}
        return batch


class _Batches(Dataset):
    """A batch for each list of draws."""

    def __init__(self, config: DatasetConfig, processor: Processor):
        self.config = config
        self.processor = processor

    def __getitem__(self, item: tuple[list[Draw], Position]) -> tuple[Batch, Position]:
        draws, position = item
        return collate(self.config, self.processor, draws), position
