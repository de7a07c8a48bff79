"""The cases that the options ask for: those of this library, or of the user's own shapes and dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from ..measure.memory import available
from ..measure.text import gibibytes
from .shapes import DIMENSIONS, Case

_SIZE = re.compile(r"([A-Za-z]+)([0-9]+)")
_EXACT_BYTES = 8  # of a number of float64


def cases(
    every: Sequence[Case],
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str = "cpu",
) -> list[Case]:
    """What is to be timed.

    Args:
        every: the cases of this library on a device.
        ops: names or parts of names of operators and layers. Default: those that have the shapes, else all.
        shapes: sizes as "B2 T512 M4 H16 d80 R64", each for every operator that is chosen. Default: those of
            `every`.
        dtypes: names of dtypes. Default: those of `every`.
        device: whose memory must hold the inputs.

    Raises:
        ValueError: nothing has such a name, or cannot have such a shape.
    """
    known = [case.op for case in every]
    chosen = operators(ops, known)
    if shapes:
        found = [each for shape in shapes for each in _of_shape(every, ops and chosen, shape, device)]
    else:
        found = [case for case in every if case.op in chosen]
    if dtypes:
        found = [Case(case.op, case.sizes, dtype, case.mode) for dtype in dtypes for case in found]
    built_in = {case: case for case in every}  # with their targets, which do not count for a comparison
    return [built_in.get(case, case) for case in dict.fromkeys(found)]


def operators(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """The operators and layers of these names, or all that have one of them in theirs; without names all.

    Raises:
        ValueError: for a name that nothing has; it lists the nearest.
    """
    known = list(dict.fromkeys(known))
    chosen: list[str] = []
    for name in names:
        found = [each for each in known if each == name] or [
            each for each in known if name.lower() in each.lower()
        ]
        if not found:
            near = get_close_matches(name, known, cutoff=0.4)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"--op {name} is not one of {', '.join(known)}.{hint}")
        chosen += found
    return list(dict.fromkeys(chosen)) if names else known


def _of_shape(every: Sequence[Case], ops: Sequence[str], shape: str, device: str) -> list[Case]:
    """The kinds of cases that an operator has, in a shape of the user's."""
    given = _parse(shape)
    known = dict.fromkeys(case.op for case in every)
    taking = ops or [op for op in known if not _why_not(op, given)]
    if not taking:
        takers = "; ".join(f"{op}: {takes(op)}" for op in known)
        raise ValueError(f"--shape {shape!r} is one of no operator. They take {takers}.")
    found = []
    for op in taking:
        if why_not := _why_not(op, given) or _why_impossible(sizes := _sizes(op, given), device):
            raise ValueError(f"--shape {shape!r} {why_not}; {op} takes {takes(op)}.")
        kinds = dict.fromkeys((case.dtype, case.mode) for case in every if case.op == op)
        found += [Case(op, sizes, *kind) for kind in kinds]
    return found


def _parse(shape: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for text in shape.split():
        size = _SIZE.fullmatch(text)
        if size is None or size[1] in given:
            what = "names a dimension again" if size else "is no dimension and its size"
            raise ValueError(f'expected --shape as "B2 T512 M4", got {shape!r}, where {text!r} {what}.')
        given[size[1]] = int(size[2])
    return given


def takes(op: str) -> str:
    """The dimensions of an operator, with their defaults: "B M D H8 [Hkv] d64 R64"."""
    shown = {None: "{}", 0: "[{}]"}
    return " ".join(shown.get(size, f"{{}}{size}").format(each) for each, size in DIMENSIONS[op].items())


def _why_not(op: str, given: dict[str, int]) -> str:
    """Why these are not the dimensions of an operator, or an empty string."""
    unknown = [letter for letter in given if letter not in DIMENSIONS[op]]
    missing = [letter for letter, size in DIMENSIONS[op].items() if size is None and letter not in given]
    wrong = [f"has {', '.join(unknown)}"] * bool(unknown) + [f"lacks {', '.join(missing)}"] * bool(missing)
    return " and ".join(wrong)


def _sizes(op: str, given: dict[str, int]) -> dict[str, int]:
    """In the operator's order, so that a case of this library is the same."""
    taken = DIMENSIONS[op].items()
    return {letter: given.get(letter, size or 0) for letter, size in taken if letter in given or size}


def _why_impossible(sizes: dict[str, int], device: str) -> str:
    """Why there can be no such case here, or an empty string."""
    empty = [letter for letter, size in sizes.items() if size < 1]
    if empty:
        return f"has no {', '.join(empty)}, where at least 1 is expected"
    if "T" in sizes and sizes["T"] <= sizes["M"]:
        return f"has M{sizes['M']}, where more tokens than media are expected"
    if "Hkv" in sizes and sizes["H"] % sizes["Hkv"]:
        return f"has Hkv{sizes['Hkv']}, where a divisor of H{sizes['H']} is expected"
    if "M" in sizes and sizes.get("D", 2) < 2:
        return "has D1, where at least 2 is expected, as media are half as wide"
    free, needed = available(device), _EXACT_BYTES * _least_numbers(sizes)
    if free is not None and needed > free:
        return (
            f"needs {gibibytes(needed)} and more in float64, by which it is checked, where "
            f"{gibibytes(free)} are free"
        )
    return ""


def _least_numbers(sizes: dict[str, int]) -> int:
    """Some of the numbers that are held at a time: the scores of eager's attention, or x and the weights."""
    if "rows" in sizes:
        return sizes["D"] * (sizes["rows"] + sizes.get("out", 0))
    rows = next(letters for letters in ("BTM", "NS", "BM") if set(letters) <= set(sizes))
    return math.prod(sizes[letter] for letter in (*rows, "H", "R")) + sizes.get("D", 0) ** 2
