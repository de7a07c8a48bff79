"""Which numbers a field of a configuration may have."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from math import inf
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What an error says of a number that is expected, and whether one is such."""

    text: str
    holds: Callable[[float], bool]


POSITIVE = Range("positive", lambda value: 0 < value < inf)
SHARE = Range("a share in 0..1", lambda value: 0 <= value <= 1)


def at_least(least: int) -> Range:
    return Range(f"{least} or more", lambda value: least <= value < inf)


def at_most(most: int) -> Range:
    return Range(f"{most} or less", lambda value: value <= most)


def expect_ranges(config: Any, ranges: Mapping[str, Range], *, of: str = "") -> None:
    """Compares those fields of a dataclass that have a range and are not None; NaN is in none.

    Args:
        config: the dataclass.
        ranges: by the names of fields, those of other dataclasses too.
        of: whose fields they are, for the error.

    Raises:
        ValueError: at the first that is out of its range.
    """
    for field in fields(config):
        value, allowed = getattr(config, field.name), ranges.get(field.name)
        if allowed is not None and value is not None and not allowed.holds(value):
            raise ValueError(
                f"expected {field.name}{of and f' of {of}'} to be {allowed.text}, got {value!r}."
            )
