"""What is known of a library whose models can be patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
