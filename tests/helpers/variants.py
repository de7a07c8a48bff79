"""Libraries with a few words changed, as in forks and other releases, under the names of the originals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path, name: str, monkeypatch) -> ModuleType:
    """A file as the module of this name, until the test ends."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def edited(source: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    return source


def variant(original: ModuleType, folder: Path, monkeypatch, *edits: tuple[str, str]) -> ModuleType:
    """A module made of another one's source with other words in it."""
    path = folder / "variant.py"
    path.write_text(edited(Path(original.__file__).read_text(), *edits))
    return load(path, original.__name__, monkeypatch)
