"""What stands on which place of README.md and docs/."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import few_shot
from flamingo_kernels.commands import support

from . import models, operators, picture
from .pages import ROOT
from .records import INTEL, ZEN3, ZEN4
from .records import few_shot as few_shot_record

PROCESSORS = {"Intel Xeon (AMX)": INTEL, "AMD EPYC (Zen 4)": ZEN4}
PICTURE = ROOT / "docs" / "assets" / "gains.svg"

TABLES: dict[str, Callable[[], str]] = {
    "gains": partial(models.headlines, PROCESSORS),
    "speed": partial(operators.headlines, PROCESSORS),
    "libraries": support.libraries,
    "backends": support.backends,
    "support": support.table,
    "swapped": partial(models.swapped, INTEL),
    "versions": support.versions,
    "bench": partial(operators.whole, INTEL),
    "bench-zen4": partial(operators.whole, ZEN4),
    "bench-zen3": partial(operators.whole, ZEN3),
    "apart": partial(models.apart, INTEL, "apart"),
    "apart-zen4": partial(models.apart, ZEN4, "apart"),
    "int8": partial(models.apart, INTEL, "int8"),
    "int8-zen4": partial(models.apart, ZEN4, "int8"),
    "real": partial(models.real, INTEL),
    "presets": partial(models.presets, INTEL),
    "few-shot": lambda: few_shot.table([few_shot.Row(**each) for each in few_shot_record()["rows"]]),
}


def drawn() -> str:
    """The picture of README.md."""
    return picture.svg(PROCESSORS)
