"""The description of a library whose models can be patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

TRANSFORMERS = "transformers 4.57.6 to 5.24.0"


@dataclass(frozen=True)
class Family:
    """Classes of one library that can be swapped.

    Attributes:
        name: the name of the library or model.
        module: the module that defines the classes.
        classes: the fused classes, each of the name of the class that it replaces.
        versions: the versions of the library that the tests run with.
        fixes: the known bugs of the originals by name; a patch repeats them unless it is told to fix them.
    """

    name: str
    module: str
    classes: tuple[type[nn.Module], ...]
    versions: str
    fixes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fused(self) -> Mapping[str, type[nn.Module]]:
        """The class that replaces each, by class name."""
        return {cls.__name__: cls for cls in self.classes}
