"""The names of kernels, by which a profiler's trace tells operators apart, and their signatures."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from flamingo_kernels._backends import dispatch, library

pytest.importorskip("triton", reason="the Triton backend is optional")

PREFIXES = {
    "masked_cross_attention": "_masked_xattn_{}_",
    "perceiver_attention": "_perceiver_{}_",
    "gated_residual": "_gated_residual_{}_",
    "gated_block_decode": "_gated_block_decode_{}_",
    "linear": "_linear_{}_",
}
MOST_PARAMETERS = 17


def kernels(module: str) -> list[Any]:
    """Those that a module defines, compiled or interpreted."""
    found = [value for name, value in vars(import_module(module)).items() if name.endswith("_kernel")]
    return [kernel for kernel in found if kernel.fn.__module__ == module]


def modules() -> dict[str, str]:
    """Every module with kernels, and how their names begin."""
    operators = [each for each in dispatch.operators() if "triton" in dispatch.limits(each)]
    named = {
        f"flamingo_kernels.ops.{operator}.triton_{way}": PREFIXES[operator].format(way)
        for operator in operators
        for way in ("fwd", "bwd")
        if f"{operator}_{way}" in library.operations()
    }
    return named | {"flamingo_kernels._backends.triton.reduction": "_sum_"}


def test_a_name_begins_with_its_operator_and_way():
    for module, prefix in modules().items():
        assert kernels(module), module
        for kernel in kernels(module):
            assert kernel.fn.__name__.startswith(prefix), module


def test_no_two_kernels_have_one_name():
    names = [kernel.fn.__name__ for module in modules() for kernel in kernels(module)]
    assert sorted(names) == sorted(set(names))


def test_a_signature_is_short():
    for module in modules():
        for kernel in kernels(module):
            assert len(kernel.arg_names) <= MOST_PARAMETERS, f"{kernel.fn.__name__}{kernel.arg_names}"
