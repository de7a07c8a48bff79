"""`python -m flamingo train` and `encode`: a run from a file, its features, and the model it has trained."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from flamingo.kernels import check_kernels, use_kernels
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.training import checkpoint
from flamingo.training.config import ModelConfig, TrainingConfig
from flamingo.training.encoding import encode
from flamingo.training.lock import locked
from flamingo.training.loop import train
from flamingo.training.preflight import check_inputs, check_run, expect_fit
from flamingo.training.processes import device_of, leave, process_group, rank, say
from flamingo.training.towers import build, check, expect_same, remember

_FILE = "run.toml"  # a copy of the file of a run, in its folder


def run(path: str) -> int:
    """Trains as a TOML file says and returns the command's exit status.

    Raises:
        ImportError, OSError, ValueError: for what is missing or wrong, before the model is built where that
            can be seen.
        KeyboardInterrupt: see `train`.
    """
    config, of_model, text = _read(path)
    check_kernels(config.kernels)
    with _named(path):
        check_run(config, of_model)

    def work(model: Flamingo, processor: Processor) -> str:
        if rank() == 0:
            remember(Path(config.folder), of_model)
            _keep(text, Path(config.folder) / _FILE)
        last = train(model, processor, config)
        return f"{config.steps} steps done, {f'the last checkpoint is {last}' if last else 'no checkpoint'}"

    return _run("train", config, of_model, [config.folder], work)


def run_encode(path: str) -> int:
    """Makes the features that a TOML file names and returns the command's exit status; raises as `run`."""
    config, of_model, _ = _read(path)
    folders = sorted({str(dataset.features) for dataset in config.datasets if dataset.features is not None})
    if not folders:
        raise ValueError(f'{path}: expected a dataset with a folder, as features = "features", got none.')
    check_kernels(config.kernels)
    with _named(path):
        check_inputs(config, of_model)

    def work(model: Flamingo, processor: Processor) -> str:
        return f"{encode(model, processor, config)} images and clips encoded, in {', '.join(folders)}"

    return _run("encode", config, of_model, folders, work)


def _run(
    command: str,
    config: TrainingConfig,
    of_model: ModelConfig,
    folders: Sequence[str],
    work: Callable[[Flamingo, Processor], str],
) -> int:
    """Does a command's work with its model, in folders that are this run's alone."""
    with process_group(device_of(config.device)), ExitStack() as stack:
        for folder in folders if rank() == 0 else ():
            stack.enter_context(locked(Path(folder)))
        model, processor = _start(config, of_model, partial(say, command))
        use_kernels(model, config.kernels, partial(say, command))  # before it is sharded
        done = work(model, processor)
        if rank() == 0:
            print(done)
    if distributed.is_torchelastic_launched():
        leave()
    return 0


def load_run(path: str | Path) -> tuple[Flamingo, Processor]:
    """The model of a run with the weights of its latest checkpoint, in eval mode, and its processor.

    Args:
        path: the folder of the run, or the TOML file that `python -m flamingo train` was given. One that
            names a checkpoint of open_flamingo needs no training: before there is any, these weights are
            returned.

    Raises:
        ValueError: if the file is no configuration with a model, the checkpoint is of another one, or the
            towers are not those that the run began with.
        FileNotFoundError: if there is no such file, or no checkpoint yet.
    """
    return find_run(path, partial(say, "train"))()


def find_run(path: str | Path, say: Callable[[str], object]) -> Callable[[], tuple[Flamingo, Processor]]:
    """What `load_run` does before it builds a model; what is returned does the rest.

    Args:
        path: see `load_run`.
        say: is told what stands for something that is lost, and which parts are random.
    """
    config, of_model, _ = _read(path)
    folder = Path(config.folder, "checkpoints")
    saved = checkpoint.latest(folder, say, files=["weights.safetensors"])
    if saved is None and of_model.checkpoint is None:
        raise FileNotFoundError(f"{path}: expected a checkpoint in {folder}, got none yet.")
    if saved is not None:
        with _named(path):
            expect_fit(of_model, saved)

    def load() -> tuple[Flamingo, Processor]:
        model, processor = _start(config, of_model, say)
        if saved is not None:
            checkpoint.load_weights(dict(model.named_parameters()), saved / "weights.safetensors")
        return model.eval(), processor

    return load


def _read(path: str | Path) -> tuple[TrainingConfig, ModelConfig, bytes]:
    """A run, its model, and the text of its file, which may be read once only, as /dev/stdin."""
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(
            f"{path}: expected the folder of a run, which has a {_FILE}, got another. Name the TOML file "
            "that the run was started with."
        )
    text = file.read_bytes()
    config = TrainingConfig.from_text(text, file)
    if path.is_dir():
        config = replace(config, folder=str(path))  # it may have moved
    if config.model is None:
        raise ValueError(f"{file}: expected a table [model], got none.")
    with _named(file):
        check(config.model)
    folder = Path(config.folder)
    if checkpoint.latest(folder / "checkpoints", files=()) is not None:
        expect_same(folder, config.model)
    return config, config.model, text


@contextmanager
def _named(file: str | Path) -> Iterator[None]:
    """What is wrong with a table [model] is told with its file."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("[model]"):
            raise
        raise ValueError(f"{file}, {error}") from error


def _keep(text: bytes, copy: Path) -> None:
    """Writes a run's file into its folder, which is then enough to find the model again."""
    unfinished = copy.with_name(f"unfinished-{copy.name}")
    unfinished.write_bytes(text)
    os.replace(unfinished, copy)


def _start(
    config: TrainingConfig, of_model: ModelConfig, say: Callable[[str], object]
) -> tuple[Flamingo, Processor]:
    """What a run begins with; its frozen weights are the same every time, also those that are random."""
    torch.manual_seed(config.seed)
    return build(of_model, say)
