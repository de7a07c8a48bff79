"""The batches of a dataset, in the order of its samples, decoded by worker processes ahead of their use."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flamingo.processor import Batch, Processor
from flamingo.training.config import DatasetConfig
from flamingo.training.order import Draw, Position, SampleOrder
from flamingo.training.samples import to_document
from flamingo.training.shards import find_shards


class TrainingBatch(NamedTuple):
    """A `Batch` with what is to be learnt of it."""

    inputs: Batch
    labels: Tensor  # int64 [B, T], -100 where a token is not to be learned

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """The same batch on another device."""
        return TrainingBatch(self.inputs.to(device), self.labels.to(device))

    def split(self, size: int | None) -> Iterator["TrainingBatch"]:
        """Batches of so many documents; itself for None."""
        rows = len(self.labels)
        size = size or rows
        for start in range(0, rows, size):
            place = slice(start, start + size)
            inputs = Batch._make(None if field is None else field[place] for field in self.inputs)
            yield TrainingBatch(inputs, self.labels[place])

    @property
    def targets(self) -> int:
        """Tokens that are learned; the first of a document has nothing before it to be told from."""
        return int((self.labels[:, 1:] != -100).sum())


def collate(config: DatasetConfig, processor: Processor, draws: list[Draw]) -> TrainingBatch:
    """Reads samples and makes a batch of them; the same for the same draws, wherever it runs.

    Neither padding nor `<image>`, which a model never says, is learned.
    """
    tokenizer = processor.tokenizer
    documents = []
    for entry, seed in draws:
        try:
            documents.append(to_document(config, entry.read(), tokenizer.encode, random.Random(seed)))
        except ValueError as error:
            raise ValueError(f"{entry.shard}, sample {entry.key}: {error}") from error
    batch = processor(documents)
    learned = batch.attention_mask & (batch.input_ids != tokenizer.image_id)
    return TrainingBatch(batch, batch.input_ids.masked_fill(~learned, -100))


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
        self._batches: Iterator[tuple[TrainingBatch, Position]] = iter(
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

    def __next__(self) -> TrainingBatch:
        batch, position = next(self._batches)
        self.state = {**self.state, "position": tuple(position)}
        return batch


class _Batches(Dataset):
    """A batch for each list of draws."""

    def __init__(self, config: DatasetConfig, processor: Processor):
        self.config = config
        self.processor = processor

    def __getitem__(self, item: tuple[list[Draw], Position]) -> tuple[TrainingBatch, Position]:
        draws, position = item
        return collate(self.config, self.processor, draws), position
