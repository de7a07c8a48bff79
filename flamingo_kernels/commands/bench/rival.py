"""A rival of the user's own: `bench --rival FILE.py:NAME` or `module:NAME`.

NAME is a function that is called as the operator is, by position: see `TAKES`. For a layer it gets a copy of
that of `flamingo` and what it is called with. It returns what the operator does, in the shape and dtype of
eager's result, from which gradients of every argument can be taken. It is timed as a whole; but as a mask and
a layer are the same objects in every call, it may keep what it makes of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flamingo.user_function import user_function

from .baselines import OF_INTEGERS, Contender
from .shapes import Case

Function = Callable[..., Any]

_OF_TEXT = ("layer", "x", "media", "media_locations")
TAKES = {
    "masked_cross_attention": ("q", "k", "v", "mask"),
    "perceiver_attention": ("q", "k_media", "v_media", "k_latents", "v_latents"),
    "gated_residual": ("x", "y", "gate"),
    "gated_block_decode": ("x", "k", "v", "mask", "weights"),
    "linear": ("x", "weight"),
    "linear, int8": ("x", "weight", "weight_scale"),
    "GatedCrossAttentionBlock": _OF_TEXT,
    "its cross-attention sublayer": _OF_TEXT,
    "its decode step": _OF_TEXT,
    "PerceiverResampler": ("layer", "x"),
}


def rivals(names: Iterable[str], ops: Iterable[str]) -> dict[str, Function]:
    """The functions of these names, each of which must take what these operators do.

    Raises:
        ImportError, ValueError: there is no such function, see `user_function`, or it takes something else.
    """
    found = {name: user_function(name) for name in names}
    for name, function in found.items():
        for op in ops:
            try:
                inspect.signature(function).bind(*TAKES[op])
            except ValueError:  # one in C, which does not say what it takes
                continue
            except TypeError:
                raise ValueError(
                    f"expected --rival {name} to be called as {op}({', '.join(TAKES[op])}), "
                    f"got {name.rpartition(':')[2]}{inspect.signature(function)}."
                ) from None
    return found


def contender(function: Function, case: Case, eager: Contender) -> Contender:
    """A user's function on the numbers of eager, and differentiated as that is.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it writes into what it is given, which the others share.
    """
    given = eager.given
    assert given is not None
    with torch.no_grad():
        trial = tuple(each.clone() if isinstance(each, Tensor) else each for each in given())
        versions = [each._version for each in trial if isinstance(each, Tensor)]
        result = function(*trial)
    if versions != [each._version for each in trial if isinstance(each, Tensor)]:
        raise ValueError("expected a rival that leaves its arguments as they are, got one that changes them")
    for each in result if isinstance(result, tuple) else (result,):
        if not isinstance(each, Tensor):
            raise TypeError(f"expected a rival that returns a tensor, got {type(each).__name__}")
    budget = OF_INTEGERS if case.op == "linear, int8" else None
    return Contender(lambda: function(*given()), eager.wrt, budget=budget)
