"""What the reports of patch and fold share: how they list modules by their paths, and their end."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ._html import Raw, page, paragraph, table

R = TypeVar("R", bound="Report")


class Listing(NamedTuple):
    """A title, what was changed by its path, and why the rest was skipped."""

    title: str
    changed: Mapping[str, str]
    skipped: Mapping[str, str]


@dataclass(frozen=True, repr=False)
class Report:
    """Base class of the report of a change to modules; as a context manager, it undoes the change."""

    # Weak, so that a report that outlives its model does not keep it in memory.
    _modules: tuple[weakref.ref[nn.Module], ...] = field(repr=False, compare=False, kw_only=True)

    def _listing(self) -> Listing:
        """What the report shows."""
        raise NotImplementedError

    def __str__(self) -> str:
        title, changed, skipped = self._listing()
        lines = [title, *_table(changed)]
        if skipped:
            lines += [f"{len(skipped)} skipped", *_table(skipped)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title, changed, skipped = self._listing()
        return page(
            paragraph(title), _html_table("changed", changed), _html_table("skipped, because", skipped)
        )

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *exception: Any) -> None:
        modules = (reference() for reference in self._modules)
        self._undo(module for module in modules if module is not None)

    def _undo(self, modules: Iterator[nn.Module]) -> None:
        """Undo the change to the modules that still live."""
        raise NotImplementedError


def _counted(rows: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """Path and text, one for all paths that differ in their numbers only, and how many these are."""
    return Counter(
        (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or "(model)", text) for path, text in rows.items()
    )


def _table(rows: Mapping[str, str]) -> list[str]:
    """Lines of path, count and text."""
    counts = _counted(rows)
    width = max((len(path) for path, _ in counts), default=0)
    digits = len(str(max(counts.values(), default=0)))
    return [f"  {path:<{width}}  {count:>{digits}}  {text}" for (path, text), count in counts.items()]


def _html_table(heading: str, rows: Mapping[str, str]) -> str:
    cells = ((path, str(count), Raw(escape(text))) for (path, text), count in _counted(rows).items())
    return table(("module", "count", heading), cells) if rows else ""
