"""What a run leaves behind: rows, the contenders without one, and the files they are kept in."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from . import report


class Key(NamedTuple):
    """What tells one case from another."""

    op: str
    shape: str
    dtype: str
    mode: str


@dataclasses.dataclass(frozen=True)
class _Entry:
    op: str
    shape: str
    dtype: str
    mode: str
    contender: str

    @property
    def key(self) -> Key:
        return Key(self.op, self.shape, self.dtype, self.mode)

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by its dimensions: "B1 T256" as {"B": 1, "T": 256}."""
        return {letter: int(size) for letter, size in re.findall(r"([A-Za-z]+)(\d+)", self.shape)}


@dataclasses.dataclass(frozen=True)
class Row(_Entry):
    """One contender at one case, timed after its result was found right."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float  # this median over ours
    extra_mib: float | None  # peak memory beyond outputs and gradients; None where it cannot be measured
    err: float | None  # worst relative error against float64, see `testing.prove`; None for a floor
    budget: float | None  # what err may be
    variant: str  # backend and instruction set of ours, "" for the others
    device: str
    threads: int
    torch: str
    commit: str | None
    time: str  # of the run, UTC
    device_type: str = "cpu"
    least_bytes: int | None = None  # see `floors`; None for a layer
    sm_mhz: int | None = None  # clock of a GPU's multiprocessors right after; None where it is not known
    floor_share: float | None = None  # of the time those bytes take at copy bandwidth; None if not measured


@dataclasses.dataclass(frozen=True)
class Skipped(_Entry):
    """One contender without a row, and why."""

    reason: str
    refused: bool  # its result was wrong, rather than there being none


class Run(NamedTuple):
    """The outcome of one `bench`."""

    rows: list[Row]
    skipped: list[Skipped]

    def __str__(self) -> str:
        return report.table(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return report.html(self)

    @property
    def cases(self) -> dict[Key, dict[str, Row]]:
        """The rows of every case by contender."""
        cases: dict[Key, dict[str, Row]] = {}
        for row in self.rows:
            cases.setdefault(row.key, {})[row.contender] = row
        return cases

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what `save_json` wrote. Raises ValueError for a file of something else."""
        try:
            stored = json.loads(Path(path).read_text())
            return cls(
                [Row(**row) for row in stored["rows"]], [Skipped(**each) for each in stored["skipped"]]
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected what `bench --json` has written, got a file of something else."
            ) from error

    def updated(self, later: Run) -> Run:
        """This run with the cases that a later one measured again, in the places where they were."""
        cases = self.cases | later.cases
        again = {*later.cases, *(each.key for each in later.skipped)}
        return Run(
            [row for rows in cases.values() for row in rows.values()],
            [each for each in self.skipped if each.key not in again] + later.skipped,
        )

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """What JSON can hold."""
        return {name: [dataclasses.asdict(each) for each in kept] for name, kept in self._asdict().items()}

    def save_json(self, path: str | Path) -> None:
        with _whole(path) as file:
            file.write(json.dumps(self.as_dict(), indent=1) + "\n")

    def save_csv(self, path: str | Path) -> None:
        """The rows alone, for a spreadsheet, with a column for each dimension in place of the shape."""
        every = dict.fromkeys(letter for row in self.rows for letter in row.sizes)
        names = [field.name for field in dataclasses.fields(Row)]
        place = names.index("shape")
        with _whole(path) as file:
            writer = csv.DictWriter(
                file, [*names[:place], *every, *names[place + 1 :]], extrasaction="ignore"
            )
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) | row.sizes for row in self.rows)


@contextmanager
def _whole(path: str | Path) -> Iterator[TextIO]:
    """A file that has its name once it is whole: a kill leaves the cases before."""
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w", newline="") as file:
        yield file
    os.replace(unfinished, path)
