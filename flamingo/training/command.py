"""`python -m flamingo train` and `encode`: a run from a file, its features, and the model it has trained."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from flamingo.kernels import use_kernels
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.training import checkpoint
from flamingo.training.bad import DataError
from flamingo.training.config import ModelConfig, TrainingConfig
from flamingo.training.encoding import encode
from flamingo.training.log import read_log
from flamingo.training.loop import train
from flamingo.training.processes import device_of, leave, process_group, rank
from flamingo.training.shards import find_shards
from flamingo.training.towers import build, check, expect_same, remember


def run(path: str) -> int:
    """Trains as a TOML file says and returns the command's exit status."""

    def work(model: Flamingo, processor: Processor, config: TrainingConfig) -> str:
        if rank() == 0 and config.model is not None:
            remember(Path(config.folder), config.model)
        return f"{config.steps} steps done, the last checkpoint is {train(model, processor, config)}"

    return _run("train", path, work)


def run_encode(path: str) -> int:
    """Makes the features that a TOML file names and returns the command's exit status."""

    def work(model: Flamingo, processor: Processor, config: TrainingConfig) -> str:
        folders = {str(dataset.features) for dataset in config.datasets if dataset.features is not None}
        return f"{encode(model, processor, config)} images and clips encoded, in {', '.join(sorted(folders))}"

    return _run("encode", path, work)


def _run(name: str, path: str, work: Callable[[Flamingo, Processor, TrainingConfig], str]) -> int:
    """Does a command's work with the model of a TOML file and returns its exit status."""
    try:
        config, of_model = _read(path)
        read_log(config.folder)  # before there is a model: it may be a file of something else
        for dataset in config.datasets:
            find_shards(dataset.shards)
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    with process_group(device_of(config.device)):
        try:
            model, processor = _start(config, of_model)
            use_kernels(model, config.kernels, _say)  # before it is sharded
        except (OSError, ValueError) as error:
            raise _stop(name, error) from None
        try:
            done = work(model, processor, config)
        except DataError as error:
            raise _stop(name, error) from None
        if rank() == 0:
            print(done)
    if distributed.is_torchelastic_launched():
        leave()
    return 0


def _stop(name: str, error: OSError | ValueError) -> SystemExit:
    """The end of this process, said in a line; to return would be to wait for processes that train."""
    print(f"{name}: {str(error).removeprefix(f'{name}: ')}", file=sys.stderr)
    return SystemExit(2)


def load_run(path: str | Path) -> tuple[Flamingo, Processor]:
    """The model of a run with the weights of its latest checkpoint, in eval mode, and its processor.

    Args:
        path: of the TOML file that `python -m flamingo train` was given. One that names a checkpoint of
            open_flamingo needs no training: before there is any, these weights are returned.

    Raises:
        ValueError: if the file is no configuration with a model, the checkpoint is of another one, or the
            towers are not those that the run began with.
        FileNotFoundError: if there is no such file, or no checkpoint yet.
    """
    config, of_model = _read(path)
    saved = checkpoint.latest(Path(config.folder) / "checkpoints")
    if saved is None and of_model.checkpoint is None:
        raise FileNotFoundError(
            f"{path}: expected a checkpoint in {config.folder}/checkpoints, got none yet."
        )
    model, processor = _start(config, of_model)
    if saved is not None:
        checkpoint.load_weights(dict(model.named_parameters()), saved / "weights.safetensors")
    return model.eval(), processor


def _read(path: str | Path) -> tuple[TrainingConfig, ModelConfig]:
    config = TrainingConfig.from_toml(path)
    if config.model is None:
        raise ValueError(f"{path}: expected a table [model], got none.")
    check(config.model)
    folder = Path(config.folder)
    if checkpoint.latest(folder / "checkpoints") is not None:
        expect_same(folder, config.model)
    return config, config.model


def _start(config: TrainingConfig, of_model: ModelConfig) -> tuple[Flamingo, Processor]:
    """What a run begins with; its frozen weights are the same every time, also those that are random."""
    torch.manual_seed(config.seed)
    return build(of_model, _say)


def _say(line: str) -> None:
    """Says something once, whatever the number of processes."""
    if rank() == 0:
        print(f"train: {line}", file=sys.stderr)
