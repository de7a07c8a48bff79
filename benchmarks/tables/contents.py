"""What stands on which place of README.md and docs/."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import few_shot
from flamingo_kernels.commands import support

from . import models, operators, picture
from .pages import ROOT
from .records import AMD, INTEL
from .records import few_shot as few_shot_record

PROCESSORS = {"Intel Xeon (AMX)": INTEL, "AMD EPYC (Zen 3)": AMD}
PICTURE = ROOT / "docs" / "assets" / "gains.svg"

TABLES: dict[str, Callable[[], str]] = {
    "gains": partial(models.headlines, INTEL),
    "speed": partial(operators.headlines, PROCESSORS),
    "libraries": support.libraries,
    "backends": support.backends,
    "support": support.table,
    "swapped": partial(models.swapped, INTEL),
    "versions": support.versions,
    "bench": partial(operators.whole, INTEL),
    "bench-amd": partial(operators.whole, AMD),
    "apart": partial(models.apart, INTEL, "apart"),
    "int8": partial(models.apart, INTEL, "int8"),
    "real": partial(models.real, INTEL),
    "presets": partial(models.presets, INTEL),
    "few-shot": lambda: few_shot.table([few_shot.Row(**each) for each in few_shot_record()["rows"]]),
}


def drawn() -> str:
    """The picture of README.md."""
    return picture.svg(INTEL, PROCESSORS)
