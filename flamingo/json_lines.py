"""JSON that is handed in, and files of one value a line, in which a crash may have damaged a line."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """A value of JSON.

    Raises:
        ValueError: if it is none, or an object has a key twice, of which one would be lost.
        RecursionError: if it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object with the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def parse_line(line: bytes) -> Any:
    """A line's value, or None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
