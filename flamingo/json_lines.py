"""Files of one JSON value a line, in which a crash may have damaged a line."""

import json
from typing import Any


def parse_line(line: bytes) -> Any:
    """A line's value, or None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
