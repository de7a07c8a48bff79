"""The ways in which a class is compared with the fused one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..samples import Call

# Some originals compute parts of it in float32, whatever the dtype.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_COARSE = (torch.float16, torch.bfloat16)


class Disagreement(Exception):
    """What differs, or why nothing could be compared."""


class Round(NamedTuple):
    """One way in which all calls are compared.

    Attributes:
        seed: of weights and inputs.
        dtype: of both.
        training: the mode.
        autocast: whether the calls are made under autocast.
        spread: how much larger than usual the weights are.
        turned: the flags that are turned.
    """

    seed: int = 0
    dtype: torch.dtype = torch.float64
    training: bool = False
    autocast: bool = False
    spread: float = 1
    turned: tuple[str, ...] = ()

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        words = [f"in {mode} and {str(self.dtype).removeprefix('torch.')}"]
        words += ["under autocast"] * self.autocast + ["with large weights"] * (self.spread > 1)
        words += [f"with {' and '.join(self.turned)} turned"] * bool(self.turned)
        return " ".join(words)

    @property
    def tolerance(self) -> float:
        return _TOLERANCE[torch.bfloat16 if self.autocast else self.dtype]

    @property
    def with_gradients(self) -> bool:
        """Whether gradients are compared: not where rounding decides them."""
        return self.dtype == torch.float64 and self.spread == 1

    def makes(self, call: Call) -> bool:
        return not (call.exact and (self.autocast or self.dtype in _COARSE))


ROUNDS = (
    Round(),
    Round(seed=1, training=True),
    Round(spread=10),  # scores of some hundreds
    *(Round(dtype=dtype) for dtype in _TOLERANCE if dtype != torch.float64),
    Round(dtype=torch.float32, autocast=True),
)
