"""What was measured, as `bench` and `profile` have written it under benchmarks/results/."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from flamingo_kernels.commands.bench.rows import Run

RESULTS = Path(__file__).resolve().parents[1] / "results"
INTEL = RESULTS / "intel-xeon-2-cores"
ZEN3 = RESULTS / "amd-epyc-zen3-2-cores"
ZEN4 = RESULTS / "amd-epyc-zen4-2-cores"


@cache
def operators(device: Path) -> Run:
    """Operators and layers beside their rivals on a device."""
    return Run.load(device / "bench.json")


def whole_models(device: Path, folder: str) -> list[dict[str, Any]]:
    """Runs of `profile`: each side in a process of its own (`apart`, `int8`, `real`), or in one (`models`).

    Raises:
        ValueError: a file holds something else.
    """
    return [_read(path) for path in sorted((device / folder).glob("*.json"))]


def whole_model(device: Path, folder: str, name: str) -> dict[str, Any]:
    """One of them, by its file's name without its ending."""
    return _read(device / folder / f"{name}.json")


def was_measured(device: Path, folder: str, name: str) -> bool:
    """Whether there is such a record."""
    return (device / folder / f"{name}.json").exists()


def few_shot() -> dict[str, Any]:
    """Queries a second of few-shot evaluations."""
    return json.loads((INTEL / "few_shot.json").read_text())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}.") from error
    if not isinstance(found, dict) or not {"works", "times", "lacking"} & found.keys():
        raise ValueError(f"{path}: expected what `profile --json` has written, got something else.")
    return found
