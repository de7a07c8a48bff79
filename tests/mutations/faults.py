"""The list of faults, read from the files beside this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTS = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    """One change of one file, and the tests that should see it.

    Attributes:
        part: the list it stands in.
        path: of the file, from the project's root.
        what: is wrong, in words.
        before, after: the text, which stands once in the file, and what it becomes.
        tests: files, folders or single tests.
        only: an expression for pytest's -k, or nothing.
        equivalent: why no test can see it, or nothing.
        emulate: whether all CPU variants are compiled for this processor.
    """

    part: str
    path: str
    what: str
    before: str
    after: str
    tests: tuple[str, ...]
    only: str = ""
    equivalent: str = ""
    emulate: bool = False

    def planted(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the place is not there, or more than once.
        """
        if (count := text.count(self.before)) != 1:
            raise ValueError(
                f"{self}: expected its `before` once in the file, found it {count} times: "
                f"point {self.part}.toml at its place again."
            )
        return text.replace(self.before, self.after)

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def read(lists: Path = LISTS) -> list[Fault]:
    """All faults, in the order of the files' names."""
    return [fault for path in sorted(lists.glob("*.toml")) for fault in _of(path)]


def _of(path: Path) -> Iterator[Fault]:
    for file in tomllib.loads(path.read_text())["file"]:
        for fault in file["fault"]:
            yield _fault(path.stem, file, fault)


def _fault(part: str, file: dict[str, Any], fault: dict[str, Any]) -> Fault:
    shared = {name: value for name, value in file.items() if name != "fault"}
    merged = {**shared, **fault}
    return Fault(part, **{**merged, "tests": tuple(merged["tests"])})
