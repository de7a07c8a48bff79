"""Patches a model that is to be compared with itself, and refuses to compare it if nothing was swapped."""

from __future__ import annotations

from torch import nn

from ...patch import PatchReport, patch


class NothingSwappedError(ValueError):
    """No module of a model was swapped, so before and after would be the same model."""


def swapped(model: nn.Module, *, linears: bool = False) -> PatchReport:
    """Patch a model. Raises NothingSwappedError with the reasons of every module that stays as it is."""
    report = patch(model, linears=linears)
    if not report.replaced:
        reasons = "; ".join(dict.fromkeys(report.skipped.values()))
        raise NothingSwappedError(
            f"expected modules that patch swaps in {type(model).__name__}, got none, and the model would be "
            f"compared with itself: {reasons}."
        )
    return report
