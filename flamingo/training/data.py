"""The batches of a dataset, in the order of its samples, decoded by worker processes ahead of their use."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from flamingo.processor import Batch, Processor
from flamingo.training import interrupt
from flamingo.training.bad import Bad, DataError, examples
from flamingo.training.config import DatasetConfig, Documents, TrainingConfig
from flamingo.training.features import FeatureStore
from flamingo.training.order import Draw, Position, SampleOrder
from flamingo.training.samples import decode, to_document
from flamingo.training.shards import find_shards

ATTEMPTS = 100  # samples in a row that may be bad


class Reader:
    """Draws to batches; the same for the same draws, wherever it runs.

    A sample that cannot be read is left out, and another takes its place.

    Args:
        config: of the dataset.
        processor: of documents.
        order: which gives substitutes.
        features: what stands for images and clips, if it is not their pixels.
    """

    def __init__(
        self,
        config: DatasetConfig,
        processor: Processor,
        order: SampleOrder,
        features: FeatureStore | None = None,
    ):
        self.config = config
        self.processor = processor
        self.order = order
        self.features = features

    def batch(self, draws: list[Draw]) -> tuple[Batch, list[Bad]]:
        """A batch, and which of its samples were bad.

        Raises:
            DataError: if there seem to be no others.
        """
        documents, sees_next, bad = [], [], []
        for draw in draws:
            document, chance, failed = self._document(draw)
            documents.append(document)
            sees_next.append(chance)
            bad += failed
        return self.processor(documents, p_next=sees_next), bad

    def _document(self, draw: Draw) -> tuple[list[Any], float, list[Bad]]:
        """A draw's document, whether it sees the next image, and the sample if it was bad."""
        failed: list[Bad] = []
        while len(failed) < ATTEMPTS:
            tried = self.order.substitute(draw, len(failed)) if failed else draw
            chance = random.Random(tried.seed)
            try:
                document = self._read(tried, chance)
            except DataError:
                raise
            except (ValueError, FileNotFoundError, RecursionError) as error:
                failed.append(Bad(tried.entry.shard, tried.entry.key, _reason(error)))
                continue
            looks_ahead = isinstance(self.config, Documents) and chance.random() < self.config.p_next
            return document, float(looks_ahead), failed[:1]
        raise DataError(
            f"dataset {self.config.name!r}: expected {self.config.kind}, got {ATTEMPTS} bad samples in a "
            f"row, as {examples(failed)}."
        )

    def _read(self, draw: Draw, chance: random.Random) -> list[Any]:
        show = decode if self.features is None else self.features.show(draw.entry.shard)
        return to_document(self.config, draw.entry.read(), self.processor.encode, chance, show)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("Processor: ")[:500]


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


def order_of(
    config: DatasetConfig, *, seed: int, at_once: int, state: Mapping[str, Any] | None = None
) -> SampleOrder:
    """The order of a dataset's samples.

    Args:
        config: of the dataset.
        seed, at_once: see `SampleOrder`.
        state: of a `Stream` that is to be continued, None for the beginning.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if the state is of other shards, another seed or another `at_once`.
    """
    order = SampleOrder(find_shards(config.shards), seed=seed, at_once=at_once)
    if state and state.get("order") != order.identity:
        raise ValueError(
            "expected the shards, the seed and shards_at_once of the checkpoint for dataset "
            f"{config.name!r}, got others. Take those again, or another folder for another run."
        )
    return order


def expect_same_data(config: TrainingConfig, states: Mapping[str, Any]) -> None:
    """Compares the datasets of a run with those of a checkpoint, by what it says of their streams.

    Raises:
        ValueError: if they have other names: one that is new, or called otherwise, would begin anew. Or see
            `order_of`.
        FileNotFoundError: if there are no shards.
    """
    names = {dataset.name for dataset in config.datasets}
    if names != states.keys():
        raise ValueError(
            f"expected the datasets of the checkpoint, {', '.join(sorted(states))}, got "
            f"{', '.join(sorted(names))}. Name them so again, or take another folder for another run."
        )
    for dataset in config.datasets:
        order_of(dataset, seed=config.seed, at_once=config.shards_at_once, state=states[dataset.name])


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
        features: see `Reader`.

    Attributes:
        state: after the last batch that was taken, not the last that was read ahead.
        bad: samples of the last batch that were left out.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if the state is of other shards, another seed or another `at_once`.
        DataError: if features are of another encoder, preprocessing or shard, or are not there;
            from the iterator, if a shard is damaged or no sample can be read.
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
        features: FeatureStore | None = None,
    ):
        order = order_of(config, seed=seed, at_once=at_once, state=state)
        position = Position(*state["position"]) if state else Position()
        if features is not None:
            features.check(order.shards)
        self.state: dict[str, Any] = {"order": order.identity, "position": tuple(position)}
        self.bad: list[Bad] = []
        self._batches: Iterator[_Item | DataError] = iter(
            DataLoader(
                _Batches(Reader(config, processor, order, features)),
                sampler=order.batches(config.batch_size, position, rank=rank, world_size=world_size),
                batch_size=None,  # an item is a batch
                num_workers=workers,
                pin_memory=pin_memory,
                worker_init_fn=interrupt.ignore,
                generator=torch.Generator(),  # the loader draws from it, and not from the run's
            )
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        item = next(self._batches)
        if isinstance(item, DataError):
            raise item
        self.bad = item.bad
        self.state = {**self.state, "position": tuple(item.position)}
        return item.batch


class _Item(NamedTuple):
    batch: Batch
    bad: list[Bad]
    position: Position


class _Batches(Dataset):
    """A batch for each list of draws."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, item: tuple[list[Draw], Position]) -> _Item | DataError:
        draws, position = item
        try:
            return _Item(*self.reader.batch(draws), position)
        except DataError as error:  # raised here, a worker would put its traceback into the message
            return error
