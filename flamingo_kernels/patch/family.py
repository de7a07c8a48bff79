"""The libraries whose models can be patched, and how a module is recognised as one of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from torch import nn

TRANSFORMERS = "transformers 4.57.6 to 5.23.0"


@dataclass(frozen=True)
class Family:
    """Classes of one library that can be swapped.

    Attributes:
        name: of the library or model.
        module: that defines the classes.
        fused: by class name what replaces it.
        versions: of the library, that the tests ran with.
        fixes: by name, the known bugs of the originals that a patch repeats unless it is told to fix them.
    """

    name: str
    module: str
    fused: Mapping[str, type[nn.Module]]
    versions: str
    fixes: Mapping[str, str] = field(default_factory=dict)


class Match(NamedTuple):
    """A class of a family, found among the bases of some module's class, and what replaces it."""

    known: type[nn.Module]
    fused: type[Any]
    family: Family


@cache
def families() -> tuple[Family, ...]:
    """All families. None of their libraries is imported: a model brings its own."""
    from . import evolla, flamingo, flamingo_pytorch, idefics, idefics2, mllama, open_flamingo

    return (
        flamingo.FAMILY,
        open_flamingo.FAMILY,
        flamingo_pytorch.FAMILY,
        idefics.FAMILY,
        idefics.RESAMPLER,
        idefics2.FAMILY,
        mllama.FAMILY,
        evolla.FAMILY,
    )


def match(cls: type) -> Match | None:
    """The nearest class of a family that `cls` is or derives from."""
    for base in cls.__mro__:
        for family in families():
            if base.__module__ == family.module and base.__name__ in family.fused:
                return Match(base, family.fused[base.__name__], family)
    return None


def supported() -> str:
    """One line a family, for messages."""
    return "".join(
        f"\n  {family.name}: {', '.join(family.fused)} of {family.module}" for family in families()
    )
