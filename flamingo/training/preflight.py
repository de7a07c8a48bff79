"""What would end a run after its model was built, looked for before that."""

from importlib import import_module
from pathlib import Path

import torch

from flamingo.config import FlamingoConfig
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.training import checkpoint
from flamingo.training.config import DatasetConfig, Documents, ModelConfig, TrainingConfig
from flamingo.training.data import Reader, expect_same_data
from flamingo.training.features import expect_made
from flamingo.training.log import read_log
from flamingo.training.order import Position, SampleOrder
from flamingo.training.shards import find_shards


def check_run(config: TrainingConfig, model: ModelConfig) -> None:
    """Looks at what training needs, and at what it goes on from; raises as `check_inputs`.

    Raises:
        ValueError: if the log or all checkpoints are damaged, or of another model or other data.
        DataError: if features are not made yet.
    """
    for module in ("tqdm", *(["tensorboard"] if config.tensorboard else [])):
        import_module(module)
    check_inputs(config, model)
    for dataset in config.datasets:
        if dataset.features is not None:
            expect_made(Path(dataset.features), find_shards(dataset.shards))
    folder = Path(config.folder)
    read_log(folder)
    saved = checkpoint.latest(folder / "checkpoints")
    if saved is not None:
        expect_same_data(config, checkpoint.read_state(saved)["streams"])
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
    for module in ("safetensors", "PIL"):
        import_module(module)
    built = _without_memory(model)
    for name in ("vision", "language"):
        path = getattr(model, f"{name}_weights")
        if built is not None and path is not None:
            checkpoint.expect_fit(getattr(built, name).state_dict(keep_vars=True), path)
    for dataset in config.datasets:
        _read_one(dataset)


def _without_memory(model: ModelConfig) -> Flamingo | None:
    """The model with names and shapes alone; None if a tower in a folder decides them."""
    if model.vision is not None or model.language is not None:
        return None
    with torch.device("meta"):
        return Flamingo(FlamingoConfig.preset(model.preset, **model.changes))


def _read_one(dataset: DatasetConfig) -> None:
    if isinstance(dataset, Documents) and dataset.images and not Path(dataset.images).is_dir():
        raise ValueError(
            f"dataset {dataset.name!r}: expected images to be a folder, got {dataset.images}, which is none."
        )
    order = SampleOrder(find_shards(dataset.shards), seed=0, at_once=1)
    draw, _ = next(order.draws(Position()))
    Reader(dataset, Processor(image_size=32), order).batch([draw])
