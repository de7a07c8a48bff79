"""Kernels with a fault, in a case that a process which is started anew can import."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flamingo_kernels.testing import GatedResidualCase, Outputs, Tensors


@dataclass(frozen=True, kw_only=True)
class Faulty(GatedResidualCase):
    """Right on the reference alone."""

    fault: str = ""

    def call(self, tensors: Tensors, options: dict[str, Any], backend: str = "auto") -> Outputs:
        outputs = super().call(tensors, options, backend)
        return outputs if backend == "reference" else FAULTS[self.fault](outputs)


def hang(outputs: Outputs) -> Outputs:
    time.sleep(600)
    return outputs


def zeros(outputs: Outputs) -> Outputs:
    return tuple(0 * out for out in outputs)


def raise_error(outputs: Outputs) -> Outputs:
    raise RuntimeError("CUDA error: misaligned address")


def import_what_is_missing(outputs: Outputs) -> Outputs:
    import no_such_module  # noqa: F401

    return outputs


FAULTS = {each.__name__: each for each in (hang, zeros, raise_error, import_what_is_missing)}
