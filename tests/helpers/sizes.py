"""Cases whose sizes are above what a backend says it takes."""

from __future__ import annotations

import pytest

from flamingo_kernels import UnsupportedError
from flamingo_kernels._backends import dispatch
from flamingo_kernels.testing import Case


def skip_unless_supported(case: Case, backend: str) -> None:
    """Skip where a backend refuses a size, and for no other reason."""
    try:
        dispatch.resolve(case.operator, backend, *case.tensors().values())
    except UnsupportedError as error:
        if all(" is above " in reason for reason in error.reasons[backend]):
            pytest.skip(f"{backend}: {'; '.join(error.reasons[backend])}")
        raise
