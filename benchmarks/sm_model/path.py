"""The instructions that a warp executes, in order: branches followed, given how often each loop runs.

The code is not executed, so nobody knows which way a branch goes. These rules say it:

    a loop              runs as often as the caller says; loops are counted in the order in which they end
    a branch forward    is taken where it jumps over loops that all run 0 times, or over a call (a division of
                        64 bits whose operands may be large), or where the caller says so; else it is not, and
                        what is guarded is executed
    a switch            goes to the code that follows it
    an early exit       is not taken
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from .machine_code import Instruction

_LONGEST = 1_000_000


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """The first and last place of every loop's body; the last is the branch back."""
    places = {each.address: place for place, each in enumerate(code)}
    branches = [(place, each) for place, each in enumerate(code) if each.opcode == "BRA" and each.predicate]
    return [(places[each.target], place) for place, each in branches if places[each.target] < place]


def follow(code: Sequence[Instruction], runs: Sequence[int], taken: Collection[int] = ()) -> list[int]:
    """The places of the instructions that a warp executes.

    Args:
        code: a whole kernel.
        runs: how often each of its loops runs, whenever it is reached.
        taken: which of the branches forward that no other rule decides are taken, counted from the first.

    Raises:
        ValueError: the kernel has another number of loops.
    """
    return list(_follow(code, runs, taken))


def _follow(code: Sequence[Instruction], runs: Sequence[int], taken: Collection[int]) -> Iterator[int]:
    bodies = loops(code)
    if len(bodies) != len(runs):
        described = ", ".join(f"{code[first].address:#x}-{code[last].address:#x}" for first, last in bodies)
        raise ValueError(f"{len(bodies)} loops are in the code ({described}), and {len(runs)} are told of")
    trips = {last: count for (_, last), count in zip(bodies, runs, strict=True)}
    places = {each.address: place for place, each in enumerate(code)}
    skips = _decide(code, places, trips, taken)
    done: Counter[int] = Counter()  # runs of each loop since it was entered
    place = 0
    for _ in range(_LONGEST):
        yield place
        each = code[place]
        if each.opcode == "EXIT" and not each.predicate:
            return
        if place in trips:
            done[place] += 1
            jumps = done[place] < trips[place]
            done[place] *= jumps
        else:
            jumps = skips.get(place, False)
        place = places[each.target] if jumps else place + 1
    raise ValueError(f"a warp executes more than {_LONGEST} instructions")


def _decide(
    code: Sequence[Instruction], places: Mapping[int, int], trips: Mapping[int, int], taken: Collection[int]
) -> dict[int, bool]:
    """Whether each branch forward is taken."""
    skips, undecided = {}, 0
    for place, each in enumerate(code):
        if each.opcode != "BRA" or each.name == "BRA.DIV" or places[each.target] <= place:
            continue
        jumped = range(place + 1, places[each.target])
        inside = [trips[end] for end in jumped if end in trips]
        if not each.predicate:
            skips[place] = True
        elif inside:
            skips[place] = not any(inside)
        elif any(code[other].opcode == "CALL" for other in jumped):
            skips[place] = True
        else:
            skips[place] = undecided in taken
            undecided += 1
    return skips
