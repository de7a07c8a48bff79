"""Samples that cannot be read: left out, counted, and too many of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_LATEST = 10  # bad samples from which examples are taken


class DataError(ValueError):
    """The data of a run cannot be read."""


class Bad(NamedTuple):
    """A sample that was left out."""

    shard: str
    sample: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.sample}: {self.reason}"


def examples(bad: Iterable[Bad], most: int = 3) -> str:
    """The first few, each of another reason where there are such."""
    by_reason = {each.reason: each for each in reversed(list(bad))}
    return "; ".join(str(each).removesuffix(".") for each in list(reversed(by_reason.values()))[:most])


class Tally:
    """How many samples of a dataset were drawn, and how many of them are bad, in all processes.

    Args:
        name: of the dataset.
        max_bad: largest share.
        state: of a `Tally` that this one continues.
    """

    def __init__(self, name: str, max_bad: float, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.name = name
        self.max_bad = max_bad
        self.drawn: int = state.get("drawn", 0)
        self.bad: int = state.get("bad", 0)
        self.epoch: int = state.get("epoch", 0)
        self._latest = [Bad(*each) for each in state.get("latest", [])]

    @property
    def state(self) -> dict[str, Any]:
        latest = [tuple(each) for each in self._latest]
        return {"drawn": self.drawn, "bad": self.bad, "epoch": self.epoch, "latest": latest}

    def add(self, drawn: int, bad: Sequence[Bad], epoch: int) -> None:
        """Counts a batch, after which the data stands in an epoch.

        Raises:
            DataError: if the share of bad samples is larger than `max_bad`. Within an epoch it has to be so
                by more than three standard deviations: of two samples one may be bad.
        """
        before = self.bad
        self.drawn += drawn
        self.bad += len(bad)
        self._latest = [*bad, *self._latest][:_LATEST]
        allowed = self.max_bad * self.drawn
        too_many = self.bad > allowed + 3 * math.sqrt(allowed)
        if epoch > self.epoch:
            self.epoch = epoch
            # The last batch may reach into the new epoch: only its draws count, and not what was bad in it.
            too_many = too_many or before > allowed
        if too_many:
            raise DataError(
                f"dataset {self.name!r}: expected at most max_bad = {self.max_bad:g} of its samples to be "
                f"bad, got {self.bad} of {self.drawn}, as {examples(self._latest)}."
            )
