"""What the reports of patch and fold share: how they list modules by their paths, and their end."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

R = TypeVar("R", bound="Report")


@dataclass(frozen=True)
class Report:
    """Base class of the report of a change to modules; as a context manager, it undoes the change."""

    # Weak, so that a report that outlives its model does not keep it in memory.
    _modules: tuple[weakref.ref[nn.Module], ...] = field(repr=False, compare=False, kw_only=True)

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exception: Any) -> None:
        modules = (reference() for reference in self._modules)
        self._undo(module for module in modules if module is not None)

    def _undo(self, modules: Iterator[nn.Module]) -> None:
        """Undo the change to the modules that still live."""
        raise NotImplementedError


def listing(title: str, changed: Mapping[str, str], skipped: Mapping[str, str]) -> str:
    """A title, the table of what was changed, and that of what was skipped and why."""
    lines = [title, *_table(changed)]
    if skipped:
        lines += [f"{len(skipped)} skipped", *_table(skipped)]
    return "\n".join(lines)


def _table(rows: Mapping[str, str]) -> list[str]:
    """Lines of path, count and text, one for all paths that differ in their numbers only."""
    counts = Counter(
        (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or "(model)", text) for path, text in rows.items()
    )
    width = max((len(path) for path, _ in counts), default=0)
    digits = len(str(max(counts.values(), default=0)))
    return [f"  {path:<{width}}  {count:>{digits}}  {text}" for (path, text), count in counts.items()]
