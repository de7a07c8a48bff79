"""The families that can be patched, and how a module is recognised as one of theirs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .family import Family


class Match(NamedTuple):
    """A known class, found among the bases of a module's class, and the class that replaces it."""

    known: type[nn.Module]
    fused: type[Any]
    family: Family


@cache
def families() -> tuple[Family, ...]:
    """All families. Their libraries are not imported, since a model comes with its own."""
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
