"""The description of a library whose models can be patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

TRANSFORMERS = "transformers 4.57.6 to 5.23.0"


@dataclass(frozen=True)
class Family:
    """Classes of one library that can be swapped.

    Attributes:
        name: the name of the library or model.
        module: the module that defines the classes.
        fused: the class that replaces each, by class name.
        versions: the versions of the library that the tests run with.
        fixes: the known bugs of the originals by name; a patch repeats them unless it is told to fix them.
    """

    name: str
    module: str
    fused: Mapping[str, type[nn.Module]]
    versions: str
    fixes: Mapping[str, str] = field(default_factory=dict)
