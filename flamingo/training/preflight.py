"""What would end a run after its model was built, looked for before that."""

import os
from importlib import import_module
from pathlib import Path

import torch

from flamingo.config import FlamingoConfig
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.training import checkpoint
from flamingo.training.config import DatasetConfig, Documents, ModelConfig, TrainingConfig
from flamingo.training.data import Reader, expect_same_data
from flamingo.training.features import expect_made, name_apart
from flamingo.training.log import read_log
from flamingo.training.order import Position, SampleOrder
from flamingo.training.shards import find_shards


def check_run(config: TrainingConfig, model: ModelConfig) -> None:
    """Looks at what training needs, and at what it goes on from; raises as `check_inputs`.

    Raises:
        ValueError: if the log or all checkpoints are damaged, or of another model or other data.
        DataError: if features are not made yet.
    """
    if config.tensorboard:
        import_module("tensorboard")
    check_inputs(config, model)
    for dataset in config.datasets:
        if dataset.features is not None:
            expect_made(Path(dataset.features), find_shards(dataset.shards))
    folder = Path(config.folder)
    read_log(folder)
    saved = checkpoint.latest(folder / "checkpoints")
    if saved is not None:
        expect_same_data(config, checkpoint.read_state(saved)["streams"])
        expect_fit(model, saved)


def expect_fit(model: ModelConfig, saved: Path) -> None:
    """Raises ValueError if a checkpoint is of another model, where that can be seen without its towers."""
    built = _without_memory(model)
    if built is not None:
        checkpoint.expect_fit(dict(built.freeze().named_parameters()), saved / "weights.safetensors")


def check_inputs(config: TrainingConfig, model: ModelConfig) -> None:
    """Looks at the weights of frozen parts, and a first sample of each dataset.

    Raises:
        ImportError: if a package is missing.
        FileNotFoundError: if there are no shards.
        ValueError: if weights are of another model.
        DataError: if a shard is damaged, or many samples in a row cannot be read.
    """
    for module in ("tqdm", "safetensors", "PIL"):
        import_module(module)
    built = _without_memory(model)
    for name in ("vision", "language"):
        path = getattr(model, f"{name}_weights")
        if built is not None and path is not None:
            checkpoint.expect_fit(getattr(built, name).state_dict(keep_vars=True), path)
    for dataset in config.datasets:
        _expect_room(dataset, model)
        _read_one(dataset)
        if dataset.features is not None:
            name_apart(Path(dataset.features), find_shards(dataset.shards))


def _expect_room(dataset: DatasetConfig, model: ModelConfig) -> None:
    """Raises ValueError if a document may have more images than the model has embeddings of their places."""
    most = FlamingoConfig.preset(model.preset).max_num_media
    most = model.changes.get("max_num_media", most)
    if isinstance(dataset, Documents) and most is not None and dataset.max_images > most:
        raise ValueError(
            f"dataset {dataset.name!r}: expected max_images to be at most max_num_media = {most} of the "
            f"model, got {dataset.max_images}."
        )


def _without_memory(model: ModelConfig) -> Flamingo | None:
    """The model with names and shapes alone; None if a tower in a folder decides them."""
    if model.vision is not None or model.language is not None:
        return None
    try:
        with torch.device("meta"):
            built = Flamingo(FlamingoConfig.preset(model.preset, **model.changes))
    except (RuntimeError, OverflowError) as error:  # sizes whose product no tensor has
        raise ValueError(f"[model]: expected sizes of a model that can be built, got: {error}.") from error
    needed, memory = sum(each.nbytes for each in built.state_dict().values()), _memory()
    if needed > memory:
        raise ValueError(
            f"[model]: expected a model that fits into the memory of this machine, {memory / 2**30:.0f} GiB, "
            f"got one with weights of {needed / 2**30:.0f} GiB. Take a smaller preset, or another machine."
        )
    return built


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_one(dataset: DatasetConfig) -> None:
    if isinstance(dataset, Documents) and dataset.images is not None and not os.path.isdir(dataset.images):
        raise ValueError(
            f"dataset {dataset.name!r}: expected images to be a folder, got {dataset.images}, which is none."
        )
    order = SampleOrder(find_shards(dataset.shards), seed=0, at_once=1)
    draw, _ = next(order.draws(Position()))
    Reader(dataset, Processor(image_size=32), order).batch([draw])
