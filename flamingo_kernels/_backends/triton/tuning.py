"""Measures the configurations of a kernel on first use, where FLAMINGO_KERNELS_AUTOTUNE=1 asks for it.

What was found is kept for the process and on disk, under everything that may change it: the kernel and its
source, the key of the choice, the device, and the versions of Triton and torch. During the capture of a CUDA
graph nothing can be measured, so the default runs there until the kernel has been called outside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from .. import env
from .config import Choice, Config, device_of

C = TypeVar("C", bound=Config)
_FOUND: dict[str, dict[str, Any]] = {}


def choose(kernel: Any, choice: Choice[C], run: Callable[[C], Any], device: torch.device) -> C:
    """The fastest candidate, measured if it is not known yet."""
    if len(choice.candidates) == 1:
        return choice.default
    key = _key(kernel, choice, device)
    found = _FOUND.get(key) or _read(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return choice.default
        best = min(choice.candidates, key=lambda config: measure(lambda: run(config)))
        found = dataclasses.asdict(best)
        _write(key, found)
    _FOUND[key] = found
    return type(choice.default)(**found)


def measure(call: Callable[[], Any]) -> float:
    """The median time of a call in milliseconds, with the device's clock; infinite where it cannot run."""
    try:
        return triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _key(kernel: Any, choice: Choice[Any], device: torch.device) -> str:
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    candidates = [dataclasses.asdict(each) for each in choice.candidates]
    facts = [kernel.__name__, _sources(), choice.key, device_of(device), name, versions, candidates]
    return json.dumps(facts, default=str)


@cache
def _sources() -> str:
    """A hash of all Triton files: what a kernel calls may lie in another one than it."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for path in sorted([*package.glob("_backends/triton/*.py"), *package.glob("ops/*/triton_*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _file(key: str) -> Path:
    return env.CACHE / "tuning" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(key: str) -> dict[str, Any] | None:
    try:
        stored = json.loads(_file(key).read_text())
    except (OSError, ValueError):
        return None
    return stored["config"] if stored.get("key") == key else None


def _write(key: str, found: dict[str, Any]) -> None:
    """Whole or not at all: processes may write the same file at once."""
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"key": key, "config": found}, indent=1) + "\n")
        draft.replace(path)
    except OSError:  # a folder that cannot be written costs a measurement a process, nothing else
        pass
