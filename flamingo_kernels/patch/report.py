"""The report of a patch, which also ends a `with patch(model)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .._report import Listing, Report
from .swap import restore


@dataclass(frozen=True, repr=False)
class PatchReport(Report):
    """What `patch` swapped and what it did not; as a context manager, it unpatches the model at the end.

    Attributes:
        replaced: the old and the new class of each module, by its path in the model. A module with several
            paths stands under the first.
        skipped: why a module was left as it is, by its path.
        policies: the mask policies of the model's fused cross-attention, see `MediaMask`.
        fixes: the known bugs of the originals that the replaced modules do not repeat.
        notes: how a replaced module was recognised, by its path, where it was not by name, place and source.
        linears: the old class of each linear layer that got the fastest product, by its path; see `patch`.

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
    notes: Mapping[str, str] = field(default_factory=dict)
    linears: Mapping[str, type[nn.Module]] = field(default_factory=dict)

    def _listing(self) -> Listing:
        policies = " and ".join(f'"{policy}"' for policy in self.policies)
        title = (
            f"patch: {len(self.replaced)} module{'s' * (len(self.replaced) != 1)} replaced"
            + (f", mask policy {policies}" if policies else "")
            + (f", fixed: {', '.join(self.fixes)}" if self.fixes else "")
        )
        for cls, count in Counter(self.linears.values()).items():
            title += f"\n  linear layers  {count}  {cls.__module__}.{cls.__qualname__}"
        old = {
            path: f"{old.__module__}.{old.__qualname__}"
            + (f" ({self.notes[path]})" if path in self.notes else "")
            for path, (old, _) in self.replaced.items()
        }
        return Listing(title, old, self.skipped)

    def _undo(self, modules: Iterator[nn.Module]) -> None:
        restore(modules)
