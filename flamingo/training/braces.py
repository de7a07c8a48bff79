"""Braces in names of shards, as a shell and WebDataset expand them."""

import re

_NUMBERS = r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?"
_LETTERS = r"[A-Za-z]\.\.[A-Za-z]"
# Braces that hold no others: the innermost come first. A list has a comma, and other braces are a name's own.
_BRACES = re.compile(rf"\{{(?:({_NUMBERS})|({_LETTERS})|([^{{}}]*,[^{{}}]*))\}}")

_MOST = 1_000_000


def expand(pattern: str) -> list[str]:
    """Every name that a pattern stands for, in its order.

    Ranges of numbers may have a step, and keep the zeros in front of them::

        {8..10}  8 9 10        {008..010}  008 009 010        {0..4..2}  0 2 4        {a,b}  a b

    Raises:
        ValueError: if there are more than a million.

    >>> expand("cc/{09..10}/{a,b}.tar")
    ['cc/09/a.tar', 'cc/09/b.tar', 'cc/10/a.tar', 'cc/10/b.tar']
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    numbers, letters, names = found.groups()
    options = _numbers(numbers) if numbers else _letters(letters) if letters else names.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    expanded: dict[str, None] = {}
    for option in options:
        expanded.update((name, None) for name in expand(f"{before}{option}{after}"))
        if len(expanded) > _MOST:
            raise _too_many(pattern)
    return list(expanded)


def _numbers(text: str) -> list[str]:
    first, last, *step = text.split("..")
    padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    by = abs(int(step[0])) or 1 if step else 1
    found = _from_to(int(first), int(last), by)
    if len(found[: _MOST + 1]) > _MOST:
        raise _too_many(text)
    return [f"{number:0{width}d}" for number in found]


def _too_many(pattern: str) -> ValueError:
    return ValueError(f"find_shards: expected braces that stand for at most {_MOST} names, got {pattern}.")


def _letters(text: str) -> list[str]:
    first, last = text.split("..")
    return [chr(code) for code in _from_to(ord(first), ord(last), 1)]


def _from_to(first: int, last: int, by: int) -> range:
    """Upwards or downwards, both ends included."""
    return range(first, last + 1, by) if first <= last else range(first, last - 1, -by)
