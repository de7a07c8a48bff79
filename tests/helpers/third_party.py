"""Loads the published models which the tests compare with, or skips the test that asks for one."""

from types import ModuleType

import pytest

from flamingo_kernels.testing import tiny


def transformers_version() -> tuple[int, int]:
    """The first two numbers of the installed version, or skips the test that asks."""
    major, minor = pytest.importorskip("transformers").__version__.split(".")[:2]
    return int(major), int(minor)


def open_flamingo(module: str) -> ModuleType:
    """The module `open_flamingo.src.<module>`: "helpers", "flamingo_lm" or "utils"."""
    pytest.importorskip("einops_exts")
    try:
        return tiny.open_flamingo_module(module)
    except ImportError as error:
        pytest.skip(str(error))


def flamingo_pytorch() -> ModuleType:
    """The module `flamingo_pytorch.flamingo_pytorch`."""
    pytest.importorskip("einops_exts")
    return pytest.importorskip("flamingo_pytorch.flamingo_pytorch")
