"""The families that can be patched, and how a class is found among them by its name and place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .family import Family


class Match(NamedTuple):
    """A class that can be swapped.

    Attributes:
        known: it, or that one of its bases whose forward is replaced.
        fused: the class that replaces it.
        family: the family of the fused class.
    """

    known: type[nn.Module]
    fused: type[Any]
    family: Family

    @property
    def name(self) -> str:
        """The full name of the class that the fused one was written for."""
        return f"{self.family.module}.{self.fused.__name__}"


@cache
def families() -> tuple[Family, ...]:
    """All families. Their libraries are not imported, since a model comes with its own."""
    from . import (
        audio_flamingo,
        audio_flamingo_inference,
        evolla,
        flamingo,
        flamingo_mini,
        flamingo_pytorch,
        idefics,
        idefics2,
        ip_adapter,
        mllama,
        open_flamingo,
        open_flamingo_v1,
        open_flamingo_vlm,
        otter,
        torchtune,
        whisper_flamingo,
        xgen_mm,
    )

    return (
        flamingo.FAMILY,
        open_flamingo.FAMILY,
        open_flamingo_v1.FAMILY,
        open_flamingo_vlm.FAMILY,
        otter.FAMILY,
        xgen_mm.FAMILY,
        flamingo_pytorch.FAMILY,
        flamingo_mini.FAMILY,
        flamingo_mini.RESAMPLER,
        idefics.FAMILY,
        idefics.RESAMPLER,
        idefics2.FAMILY,
        mllama.FAMILY,
        evolla.FAMILY,
        torchtune.FAMILY,
        ip_adapter.FAMILY,
        audio_flamingo.FAMILY,
        audio_flamingo_inference.FAMILY,
        whisper_flamingo.FAMILY,
    )


def match(cls: type) -> Match | None:
    """The nearest class of a family, by name and place, that `cls` is or derives from."""
    for base in cls.__mro__:
        if known := _places().get((base.__module__, base.__name__)):
            return Match(base, *known)
    return None


@cache
def _places() -> dict[tuple[str, str], tuple[type[Any], Family]]:
    return {
        (family.module, name): (fused, family)
        for family in families()
        for name, fused in family.fused.items()
    }


@cache
def targets() -> dict[str, tuple[type[Any], Family]]:
    """Every fused class with its family, by library and class, as "open_flamingo.PerceiverResampler"."""
    return {
        f"{family.module.partition('.')[0]}.{cls.__name__}": (cls, family)
        for family in families()
        for cls in family.classes
    }


def replaced_by(fused: type[nn.Module]) -> Iterator[str]:
    """The attributes that a fused class puts in the place of its original's."""
    from ..layers import Fused  # needs `flamingo`, which `import flamingo_kernels` does not

    bases = (base for base in fused.__mro__ if issubclass(base, Fused) and base is not Fused)
    yield from (name for base in bases for name in vars(base) if not name.startswith("__"))


def supported() -> str:
    """One line a family, for messages."""
    return "".join(
        f"\n  {family.name}: {', '.join(family.fused)} of {family.module}" for family in families()
    )
