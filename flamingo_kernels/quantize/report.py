"""The report of `quantize`, which also ends a `with quantize(model)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .._report import Listing, Report
from .layer import is_quantized, restore_layer


class QuantizedLayer(NamedTuple):
    """What became of a layer.

    Attributes:
        bytes_before: of its weight.
        bytes_after: of its integers and scales.
        error: the largest difference between a weight and what stands for it.
        kept: whether the original is kept beside the integers.
    """

    bytes_before: int
    bytes_after: int
    error: float
    kept: bool


@dataclass(frozen=True, repr=False)
class QuantizeReport(Report):
    """What `quantize` changed and what it did not; as a context manager, it unquantizes the model at the end.

    Attributes:
        quantized: by a layer's path in the model, its bytes and its error.
        skipped: by path, why a layer stays as it is.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> from flamingo_kernels import quantize
        >>> report = quantize(MaskedCrossAttention(dim=8, dim_visual=8), keep=False)
        >>> report.bytes_before, report.bytes_after
        (65536, 22560)
    """

    quantized: Mapping[str, QuantizedLayer]
    skipped: Mapping[str, str]

    @property
    def bytes_before(self) -> int:
        """Of the weights that became integers."""
        return sum(layer.bytes_before for layer in self.quantized.values())

    @property
    def bytes_after(self) -> int:
        """Of their integers and scales, without originals that are kept."""
        return sum(layer.bytes_after for layer in self.quantized.values())

    @property
    def error(self) -> float:
        """The largest of all layers."""
        return max((layer.error for layer in self.quantized.values()), default=0.0)

    @property
    def title(self) -> str:
        """All layers in one line."""
        count = len(self.quantized)
        title = (
            f"quantize: {count} layer{'s' * (count != 1)}, {_mib(self.bytes_before)} of weights became "
            f"{_mib(self.bytes_after)}, largest error {self.error:.1e}"
        )
        kept = sum(layer.kept for layer in self.quantized.values())
        return f"{title}; {kept} original{'s' * (kept != 1)} kept" if kept else title

    def _listing(self) -> Listing:
        rows = {
            path: f"{_mib(layer.bytes_before)} to {_mib(layer.bytes_after)}"
            for path, layer in self.quantized.items()
        }
        return Listing(self.title, rows, self.skipped)

    def _undo(self, modules: Iterator[nn.Module]) -> None:
        layers = [module for module in modules if is_quantized(module)]
        if any(layer.integers is None for layer in layers):
            raise RuntimeError(
                "quantize: expected keep=True for a `with` that restores the model, got False."
            )
        for layer in layers:
            restore_layer(layer)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
