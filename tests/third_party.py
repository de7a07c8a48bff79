"""Loads the published models which the tests compare with, or skips the test that asks for one.

`open_flamingo` imports open_clip at its top and pins an old torch, so its package is never imported: empty
packages of its name stand in, through which the modules of `open_flamingo/src` load as usual.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def open_flamingo(module: str) -> ModuleType:
    """The module `open_flamingo.src.<module>`: "helpers", "flamingo_lm" or "utils"."""
    pytest.importorskip("einops_exts")
    if "open_flamingo" not in sys.modules:
        spec = importlib.util.find_spec("open_flamingo")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("open_flamingo is not installed")
        root = spec.submodule_search_locations[0]
        for name, folder in (("open_flamingo", root), ("open_flamingo.src", f"{root}/src")):
            package = ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
    return importlib.import_module(f"open_flamingo.src.{module}")


def flamingo_pytorch() -> ModuleType:
    """The module `flamingo_pytorch.flamingo_pytorch`."""
    pytest.importorskip("einops_exts")
    return pytest.importorskip("flamingo_pytorch.flamingo_pytorch")
