"""Whether a checkpoint is whole: its files are there, can be read, and fit each other."""

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

WEIGHTS, OPTIMIZER, STATE = FILES = ("weights.safetensors", "optimizer.safetensors", "state.pt")
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes by their names in safetensors
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's, of each weight
_GENERATORS = {"python", "numpy", "torch", "cuda"}


def damage(path: Path, files: Collection[str]) -> str:
    """What a checkpoint lacks to be whole."""
    if not path.is_dir():
        return "is no folder" if path.exists() else "is not there"
    for name in files:
        if not (path / name).is_file():
            return f"lacks {name}"
        try:
            if name == STATE:
                read_state(path)
            else:  # the sizes in the header have to be that of the file
                shapes(path / name)
        except ImportError:
            raise
        except Exception:  # whatever a reader says of damage
            return f"has a damaged {name}"
    if {WEIGHTS, OPTIMIZER} <= {*files} and not _fit(path):
        return f"has an {OPTIMIZER} of other weights"
    return ""


def _fit(path: Path) -> bool:
    """Whether a checkpoint's optimizer has moments, and of the checkpoint's own weights."""
    weights, moments = shapes(path / WEIGHTS), shapes(path / OPTIMIZER)
    kinds: dict[str, set[str]] = {}
    for key, (shape, dtype) in moments.items():
        kind, _, name = key.partition(".")
        expected = () if kind == "step" else weights.get(name, (None,))[0]
        if name not in weights or shape != expected or dtype not in FLOATS:
            return False
        kinds.setdefault(name, set()).add(kind)
    return bool(kinds) and all(each == _MOMENTS for each in kinds.values())


def shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the dtype of each tensor in a file; no tensor is read."""
    with import_module("safetensors").safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's step, the state of each dataset's `Stream`, and those of the random generators.

    Raises:
        ValueError: if the file has something else; or what `torch.load` raises for a damaged one.
    """
    state = torch.load(path / STATE, weights_only=True)
    if not _is_state(state):
        raise ValueError(f"{path / STATE}: expected the state of a run, got something else.")
    return {name: state[name] for name in ("step", "streams", "random")}


def _is_state(state: Any) -> bool:
    if not (isinstance(state, dict) and {"step", "streams", "random"} <= state.keys()):
        return False
    streams, generators = state["streams"], state["random"]
    return (
        _is_count(state["step"])
        and isinstance(streams, dict)
        and all(map(_is_stream, streams.values()))
        and isinstance(generators, list)
        and all(isinstance(each, dict) and each.keys() >= _GENERATORS for each in generators)
    )


def _is_stream(state: Any) -> bool:
    """Whether this is the state of a `Stream`, with that of its `Tally` or without."""
    if not isinstance(state, dict):
        return False
    position: Any = state.get("position")
    latest = state.get("latest", [])
    return (
        _is_triple(position)
        and all(map(_is_count, (*position, *(state.get(key, 0) for key in ("drawn", "bad", "epoch")))))
        and isinstance(latest, list)
        and all(map(_is_triple, latest))
    )


def _is_triple(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
