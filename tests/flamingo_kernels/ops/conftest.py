"""The operators' tests run the C++ kernels with every instruction set that this processor has."""

from __future__ import annotations

import pytest

from flamingo_kernels._backends import cpu
from tests.conftest import BACKENDS

# The one that the library chooses is "cpu" alone.
OTHERS = [f"cpu, {variant}" for variant in cpu.cpu_variants() if variant != cpu.cpu_variant()]
BY_VARIANT = [name for each in BACKENDS for name in ([each, *OTHERS] if each == "cpu" else [each])]


@pytest.fixture(params=BY_VARIANT)
def backend(request, running, select_variant) -> str:
    return select(request.param, running, select_variant)


@pytest.fixture(params=BY_VARIANT[1:])
def kernels(request, running, select_variant) -> str:
    return select(request.param, running, select_variant)


def select(name, running, select_variant) -> str:
    backend, _, variant = name.partition(", ")
    running(backend)
    if variant:
        select_variant(variant)
    return backend
