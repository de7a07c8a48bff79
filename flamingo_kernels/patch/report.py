"""The report of a patch, which also ends a `with patch(model)`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._report import table
from .swap import restore


@dataclass(frozen=True)
class PatchReport:
    """What `patch` swapped and what it did not; as a context manager, it unpatches the model at the end.

    Attributes:
        replaced: the old and the new class of each module, by its path in the model. A module with several
            paths stands under the first.
        skipped: why a module was left as it is, by its path.
        policies: the mask policies of the model's fused cross-attention, see `MediaMask`.
        fixes: the known bugs of the originals that the replaced modules do not repeat.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> from flamingo_kernels import patch
        >>> print(patch(MaskedCrossAttention(dim=8, dim_visual=8)))
        patch: 1 module replaced, mask policy "zero"
          (model)  1  flamingo.modules.MaskedCrossAttention
    """

    replaced: Mapping[str, tuple[type[nn.Module], type[nn.Module]]]
    skipped: Mapping[str, str]
    policies: tuple[str, ...]
    fixes: tuple[str, ...]
    # Weak, so that a report that outlives its model does not keep it in memory.
    _modules: tuple[weakref.ref[nn.Module], ...] = field(repr=False, compare=False)

    def __str__(self) -> str:
        policies = " and ".join(f'"{policy}"' for policy in self.policies)
        lines = [
            f"patch: {len(self.replaced)} module{'s' * (len(self.replaced) != 1)} replaced"
            + (f", mask policy {policies}" if policies else "")
            + (f", fixed: {', '.join(self.fixes)}" if self.fixes else "")
        ]
        lines += table(
            {path: f"{old.__module__}.{old.__qualname__}" for path, (old, _) in self.replaced.items()}
        )
        if self.skipped:
            lines += [f"{len(self.skipped)} skipped", *table(self.skipped)]
        return "\n".join(lines)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        modules = (reference() for reference in self._modules)
        restore(module for module in modules if module is not None)
