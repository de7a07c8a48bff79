"""What a run has found, in a file: a line a sample, written as it goes, so that a killed run goes on.

::

    results.jsonl      {"task": "vqa", "shots": 4, ...}        how the run was set
                       {"id": 9, "prediction": "two", ...}     a sample
                       {"id": 7, "error": "..."}               one whose image cannot be read
    results.jsonl.1    what the second of several processes has found: joined to the others in the end, or
                       when a run goes on
"""

import fcntl
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flamingo.json_lines import parse_line
from flamingo.training.processes import rank, wait_for_all, world_size

Record = dict[str, Any]

_OURS = {"task", "max_new_tokens", "num_beams", "shots", "select", "seed", "samples"}  # of a first line
_LONGEST = 2**20  # bytes of a first line


class Found(NamedTuple):
    """What is in a file of results, which is left as it is."""

    whole: int  # bytes of whole lines
    records: dict[Any, Record]  # by their ids


class Results:
    """The file of a run, and those of its processes.

    Args:
        path: of the file; the folder must be there.
        header: what two runs must share to be one.

    Attributes:
        records: by their ids, the answers that were there and what was added.

    Raises:
        ValueError: if the file, which is then left as it is, is of a run with other settings, or of no run.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.header = header
        self._first = (json.dumps(header) + "\n").encode()
        self._found = self._read(path)
        found = dict(self._found.records)
        for part in self._parts():
            found |= self._read(part).records
        # An image that could not be read may have been mended.
        self.records = {name: record for name, record in found.items() if "error" not in record}

    def open(self, order: Sequence[Any]) -> None:
        """Begins to write, behind what is there; order is that of ids in a file that is made anew."""
        wait_for_all()  # all have read what there is
        if rank() == 0:
            self._hold()
            if self._parts():
                self._join(order)
                self._hold()  # another file now
            else:
                self._held.truncate(self._found.whole)
                if not self._found.whole:
                    self._held.write(self._first)
                self._held.flush()
        wait_for_all()
        self._file: BinaryIO = self._own.open("ab")
        if world_size() > 1:
            self._file.write(self._first)

    def _hold(self) -> None:
        """Keeps other runs from this file until the process ends, however it does."""
        self._held = self.path.open("ab")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"evaluate: expected {self.path} to be this run's alone, got one that another process writes "
                "to. Wait for its end, or name another output."
            ) from error
        except OSError:
            pass  # a file system without locks

    def add(self, records: Sequence[Record]) -> None:
        """Writes samples at once: a kill leaves all or none."""
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records |= {record["id"]: record for record in records}

    def close(self, order: Sequence[Any]) -> None:
        """Ends to write; of several processes the first joins what all have found."""
        self._file.close()
        if world_size() == 1:
            self._held.close()
            return
        wait_for_all()
        for part in self._parts():
            self.records |= self._read(part).records
        wait_for_all()
        if rank() == 0:
            self._join(order)
            self._held.close()
        wait_for_all()

    @property
    def _own(self) -> Path:
        return self.path if world_size() == 1 else self._part(rank())

    def _part(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _parts(self) -> list[Path]:
        """The files of several processes, of this run or of one that was killed."""
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.*")
        return sorted(path for path in found if path.name[len(self.path.name) + 1 :].isdigit())

    def _join(self, order: Sequence[Any]) -> None:
        """Makes one file of all, in the order of the ids, and removes the others."""
        lines = [json.dumps(self.records[name]) + "\n" for name in order if name in self.records]
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_bytes(self._first + "".join(lines).encode())
        os.replace(unfinished, self.path)
        for part in self._parts():
            part.unlink()

    def _read(self, path: Path) -> Found:
        """What is in a file, if it is new, empty or of a run with this header."""
        if not path.exists():
            if not path.parent.is_dir():
                raise ValueError(f"evaluate: expected the folder of {path}, got none. Make it first.")
            return Found(0, {})
        if not path.is_file():
            raise ValueError(
                f"evaluate: expected {path} to be a file, got something else. Name another output."
            )
        with path.open("rb") as file:
            first = file.readline(_LONGEST)
            if self._first.startswith(first) and first != self._first:  # empty, or a kill has cut it short
                return Found(0, {})
            self._check_header(path, first)
            lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        records = dict(_numbered(path, lines))
        return Found(len(first) + sum(map(len, lines)), records)

    def _check_header(self, path: Path, line: bytes) -> None:
        found = parse_line(line)
        if not line.endswith(b"\n") or not isinstance(found, dict) or not found.keys() >= _OURS:
            raise ValueError(
                f"evaluate: expected {path} to be new, empty or the results of an evaluation, got a file of "
                "something else, which is left as it is. Name another output."
            )
        if found != json.loads(self._first):
            raise ValueError(
                f"evaluate: expected {path} to be of a run with {self.header}, got one with {found}. Name "
                "another output."
            )


def _numbered(path: Path, lines: Sequence[bytes]) -> Iterator[tuple[Any, Record]]:
    """The samples of a file, by their ids."""
    for number, line in enumerate(lines, start=2):
        record = parse_line(line)
        if not _is_record(record):
            raise ValueError(
                f"evaluate: expected line {number} of {path} to be an answer, got {line[:40]!r}. Remove it, "
                "or name another output."
            )
        yield record["id"], record


def _is_record(record: Any) -> bool:
    kinds: dict[str, Any] = {"id": str | int, "prediction": str, "references": list, "shots": list}
    if isinstance(record, dict) and "error" in record:
        kinds = {"id": str | int, "error": str}
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
