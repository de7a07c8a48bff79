"""Checkpoints that a kill at any moment leaves whole, and that continue a run to the bit.

::

    run/checkpoints/
        step-00001000/
            weights.safetensors     trained parameters, float32, by their names in the model
            optimizer.safetensors   AdamW's moments, "exp_avg.<name>" and so on
            state.pt                step, places in the data, states of all random generators
        step-00002000/
        latest -> step-00002000

A checkpoint is written under another name, flushed to the disk and renamed; then a rename exchanges `latest`
for a new link, and only then the oldest is removed. Where a copy or a hand has lost `latest` or its target,
the newest checkpoint that is whole takes its place.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flamingo.training.damage import FILES, FLOATS, OPTIMIZER, STATE, WEIGHTS, damage, read_state, shapes
from flamingo.training.lock import expect_folder
from flamingo.training.processes import gather, like, rank, wait_for_all, whole

LATEST = "latest"
_NAME = re.compile(r"step-[0-9]+")
_UNFINISHED = "unfinished-"


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    streams: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes a checkpoint and makes it the latest; all processes have to call.

    Args:
        folder: of all checkpoints of the run.
        step: updates so far.
        weights: the trained ones, by name.
        optimizer: of these.
        streams: the state of each dataset's `Stream`.
        keep: checkpoints to keep, this one included; a folder with anything else in it is kept too.
    """
    tensors = {name: whole(weight).contiguous() for name, weight in weights.items()}
    moments = {
        f"{kind}.{name}": whole(value).contiguous()
        for name, weight in weights.items()
        for kind, value in optimizer.state[weight].items()
    }
    state = {"step": step, "streams": dict(streams), "random": gather(_random_states())}
    path = folder / f"step-{step:08d}"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{_UNFINISHED}{path.name}"
        _remove(unfinished)
        unfinished.mkdir()
        _write(unfinished, tensors, moments, state)
        for file in (*unfinished.iterdir(), unfinished):
            _flush(file)
        _make_room(path)
        os.rename(unfinished, path)
        _point_to(path)
        _flush(folder)
        older = [each for each in _checkpoints(folder) if _step(each) < step and _is_ours(each)]
        for old in older[: max(0, len(older) - (keep - 1))]:
            _remove(old)
    wait_for_all()
    return path


def _write(
    folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Raises OSError if the disk is full."""
    safetensors = import_module("safetensors.torch")
    try:
        safetensors.save_file(weights, folder / WEIGHTS)
        safetensors.save_file(moments, folder / OPTIMIZER)
        torch.save(state, folder / STATE)
    except (import_module("safetensors").SafetensorError, RuntimeError) as error:
        raise OSError(f"{folder}: expected to write a checkpoint, got: {error}") from error


def latest(
    folder: Path, say: Callable[[str], object] = lambda line: None, files: Collection[str] = FILES
) -> Path | None:
    """The checkpoint to continue from, if there is any: `latest`, or else the newest that is whole.

    Args:
        folder: of all checkpoints of the run.
        say: is told which one was taken instead of `latest`, and why.
        files: those that have to be whole.

    Raises:
        ValueError: if there are checkpoints, all of them damaged: to begin anew would write over them.
    """
    expect_folder(folder)
    link = folder / LATEST
    named = _target(link)
    lack = damage(named, files)
    if not lack:
        return named
    steps = [path for path in _checkpoints(folder) if any((path / name).exists() for name in FILES)]
    for path in reversed(steps):
        if not damage(path, files):
            target = "" if named.name == LATEST else f"points to {named.name or named}, which "
            say(f"{link} {target}{lack}: {path.name} is taken, the newest checkpoint that is whole")
            return path
    if steps or os.path.lexists(link):
        raise ValueError(
            f"expected a whole checkpoint in {folder}, got none: {named.name} {lack}. Put one back, or "
            "remove them all to begin anew."
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, the oldest first; `step-00001000-best` is somebody's own."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load(
    path: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Sets weights, optimizer and random generators to those of a checkpoint, by any number of processes.

    A process that the saved run did not have keeps its random generators.

    Returns:
        Step, and the state of each dataset's `Stream`.

    Raises:
        ValueError: if the checkpoint is of other parameters.
    """
    load_weights(weights, path / WEIGHTS)
    safetensors = import_module("safetensors")
    with safetensors.safe_open(path / OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            kind, _, name = key.partition(".")
            value = file.get_tensor(key)
            optimizer.state[weights[name]][kind] = value if kind == "step" else like(value, weights[name])
    state = read_state(path)
    if rank() < len(state["random"]):
        _set_random_states(state["random"][rank()])
    return state["step"], state["streams"]


@torch.no_grad()
def load_weights(weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Sets parameters to those of a checkpoint's `weights.safetensors`.

    Args:
        weights: parameters by name, as `dict(model.named_parameters())`; those that are frozen may be missing
            from the file.
        path: of the file.

    Raises:
        ValueError: if the file has a name or a shape that no parameter has, or lacks a trained one.
    """
    expect_fit(weights, path)
    with import_module("safetensors").safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            weights[name].copy_(like(file.get_tensor(name), weights[name]))


def expect_fit(weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Compares parameters with those of a checkpoint, by names and shapes; raises as `load_weights`."""
    try:
        found = shapes(Path(path))
    except import_module("safetensors").SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got a damaged file: {error}.") from error
    others = found.keys() - weights.keys()
    missing = {name for name, weight in weights.items() if weight.requires_grad} - found.keys()
    if others or missing:
        wrong = [f"{len(others)} others ({_some(others)})"] * bool(others)
        wrong += [f"none for {len(missing)} of them ({_some(missing)})"] * bool(missing)
        raise ValueError(f"{path}: expected the parameters of this model, got {' and '.join(wrong)}.")
    for name, (shape, dtype) in found.items():
        if shape != tuple(weights[name].shape):
            raise ValueError(f"{path}: expected {name} with shape {tuple(weights[name].shape)}, got {shape}.")
        if dtype not in FLOATS and weights[name].is_floating_point():
            raise ValueError(f"{path}: expected {name} in floating point, got {dtype}.")


def _some(names: set[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"


def _is_ours(path: Path) -> bool:
    """Whether a folder has nothing but what `save` writes."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {*FILES}


def _point_to(path: Path) -> None:
    link = path.parent / f"{_UNFINISHED}{LATEST}"
    _remove(link)
    try:
        link.symlink_to(path.name)
    except OSError:  # a file system without links: a file says the name
        link.write_text(f"{path.name}\n")
        _flush(link)
    target = path.parent / LATEST
    if target.is_dir() and not target.is_symlink():  # a copy has made a folder of the link
        _make_room(target)
    os.replace(link, target)


def _make_room(path: Path) -> None:
    """Removes what `save` wrote under a name, and sets aside whatever else has it."""
    if _is_ours(path):
        _remove(path)
    elif os.path.lexists(path):
        os.rename(path, _free(path.with_name(f"{path.name}-kept")))


def _free(path: Path) -> Path:
    """A name that nothing has: this, or this with a number."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def _target(link: Path) -> Path:
    """The checkpoint that `latest` is a link to, or a file with the name of."""
    if link.is_symlink() or not link.is_file():
        return Path(os.path.realpath(link))
    with open(link, errors="replace") as file:
        name = file.read(100).strip()
    return link.parent / name if _NAME.fullmatch(name) else link


def _remove(path: Path) -> None:
    """Removes a checkpoint, or what is left of one; half removed it no longer looks like one."""
    if path.is_dir() and not path.is_symlink():
        unfinished = path.parent / f"{_UNFINISHED}removed"
        if path != unfinished:
            _remove(unfinished)
            os.rename(path, unfinished)
        shutil.rmtree(unfinished)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_states() -> dict[str, Any]:
    """The random generators of this process, as plain numbers and tensors, which are safe to load."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {key: _plain(value) for key, value in numpy["state"].items()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy = states["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
