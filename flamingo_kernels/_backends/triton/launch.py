"""Starts a Triton kernel on the device of its tensors and that device's current stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import copysign, e, log2
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from .. import env
from . import tuning
from .config import Choice, Config

C = TypeVar("C", bound=Config)


def launch(
    kernel: Any, programs: Callable[[C], int], choice: Choice[C], *arguments: Any, **constants: Any
) -> None:
    """Start as many programs as the chosen configuration needs.

    Args:
        kernel: a `triton.jit` function; it writes each result once and reads none, so that it may run twice.
        programs: the size of the one-dimensional grid under a configuration.
        choice: the configurations it may have.
        arguments: those of the kernel, first a tensor or a tuple of tensors. A size that changes from call to
            call is an argument of its own: within a tuple Triton compiles a kernel anew for 1 and for
            multiples of 16, whatever `do_not_specialize` says.
        constants: its compile-time arguments beside the configuration's.
    """
    first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]

    def run(config: C) -> Any:
        count = programs(config)
        keywords = {**constants, **config.keywords, **_OPTIONS}
        return start(kernel, count, arguments, keywords) if count else None

    with _on(first.device):
        run(tuning.choose(kernel, choice, run, first.device) if env.AUTOTUNE else choice.default)


# Named because Triton's default is about to change: products and sums are fused.
_OPTIONS = {"enable_fp_fusion": True}


def start(kernel: Any, count: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The launch itself: every Triton kernel of the library passes here. Gives what was compiled for it."""
    return kernel[(count,)](*arguments, **keywords)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Those of every dimension but the last, in which elements lie side by side."""
    return tuple(tensor.stride()[:-1] for tensor in tensors)


def scales(scale: float) -> tuple[float, float, tl.constexpr]:
    """A softmax's scale; the same in base 2 and without its sign; the sign.

    In base 2 it is never 0, as 0 times the -inf of a masked key is NaN; the sign of 0 is 0, so all scores are
    equal then, however large.
    """
    sign = copysign(1, scale) if scale else 0.0
    return scale, max(abs(scale) * log2(e), 2.0**-126), tl.constexpr(sign)


def precision(tensor: Tensor) -> str:
    """What a dot of float32 tensors may round to: tf32 where torch's own switch asks for it."""
    wanted = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if tensor.dtype == torch.float32 and wanted == "tf32" else "ieee"
