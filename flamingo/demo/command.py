"""`python -m flamingo demo`: mistakes are told before the work begins, findings are written after it."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from json import dumps
from pathlib import Path

import torch

from flamingo.command_line import expect_writable
from flamingo.demo.lessons import NotLearntError
from flamingo.demo.picture import check_format, draw
from flamingo.demo.run import run
from flamingo.demo.stages import make_processor
from flamingo.kernels import check_kernels
from flamingo.saved import save_model


def main(
    picture: str | Path = "digits.png",
    model: str | Path = "digits.safetensors",
    *,
    json: str | Path | None = None,
    seed: int = 0,
    threads: int = 1,
    kernels: bool = True,
    quick: bool = False,
) -> int:
    """Run the demo, print what it finds, draw it and save the model.

    Args:
        picture, model: files to write; see `flamingo.load_model`.
        json: a file for what was found; None writes none. Shares of 1: `{"drawn": {"0": 0.11, ..., "8":
            0.92}, "known": {"0": 0.98, ...}, "recall": 0.99, ...}`. Names that are drawn for each document
            and known ones, by the number of shots, and how often the language model knows a number that a
            text has said before.
        seed: of the weights, and of all that is drawn for training.
        threads: of torch, 1 to the machine's cores. Its products are small: two threads are faster where
            both have a core, and wait for each other where something else runs.
        kernels: train with the kernels, where they are installed.
        quick: a few steps of each stage, to see that it runs.

    Returns:
        0; 1 if it has not learnt what it should.

    Raises:
        ImportError, OSError, ValueError: before the work, if a package is missing, a file cannot be written,
            or a number is out of its range.
    """
    files = [Path(file) for file in (picture, model, json) if file is not None]
    _check(files, seed, threads, kernels)
    check_format(Path(picture))
    try:
        with _threads(threads):
            found, trained = run(seed=seed, kernels=kernels, quick=quick)
    except NotLearntError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    save_model(trained, make_processor(), model)
    draw(found, Path(picture))
    if json is not None:
        Path(json).write_text(dumps(found.as_json(), indent=2) + "\n")
    print("written:", *files)
    missed = [] if quick else found.missed()
    for line in missed:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if missed else 0


def _check(files: Sequence[Path], seed: int, threads: int, kernels: bool) -> None:
    """Raises what would otherwise be raised in the middle of the work, or after it."""
    for module in ("sklearn", "safetensors", "matplotlib"):
        import_module(module)
    if not 0 <= seed < 2**64:
        raise ValueError(f"expected --seed from 0 to 2**64 - 1, got {seed}.")
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ValueError(f"expected --threads from 1 to {cores}, the cores of this machine, got {threads}.")
    check_kernels(kernels)
    expect_writable(*files)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
