"""How reports list modules by their paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping


def table(rows: Mapping[str, str]) -> list[str]:
    """Lines of path, count and text, one for all paths that differ in their numbers only."""
    counts = Counter(
        (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or "(model)", text) for path, text in rows.items()
    )
    width = max((len(path) for path, _ in counts), default=0)
    digits = len(str(max(counts.values(), default=0)))
    return [f"  {path:<{width}}  {count:>{digits}}  {text}" for (path, text), count in counts.items()]
