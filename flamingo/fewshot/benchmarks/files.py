"""Files of JSON, JSON lines and CSV whose entries have what is asked for, and folders of images or videos.

Every mistake in a file is an error that names the file, the entry and the key.
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flamingo.fewshot.prompts import Sample
from flamingo.json_lines import parse
from flamingo.media import VIDEOS, Segment
from flamingo.text_files import lines, read_text

T = TypeVar("T")
Entry = dict[str, Any]
IMAGES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}
)


class Kind(NamedTuple):
    """A kind of value in JSON."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    """Whether this is a text that can be written: JSON may have halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


TEXT = Kind("a text", _is_text)
ID = Kind(
    "a number or a text",
    lambda value: _is_text(value) or (isinstance(value, int) and not isinstance(value, bool)),
)
INDEX = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
NUMBER = Kind("a number", _is_number)  # as a float takes it: no NaN, and none without end
TEXTS = Kind(
    "a list of texts",
    lambda value: isinstance(value, list) and all(map(_is_text, value)),
)
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))
SHARES = Kind(
    "a list of numbers of 0 or more", lambda value: NUMBERS.holds(value) and min(value, default=0) >= 0
)
LIST = Kind("a list", lambda value: isinstance(value, list))
TABLE = Kind("an object", lambda value: isinstance(value, dict))
YES_NO = Kind("0 or 1", lambda value: value in (0, 1) and INDEX.holds(value))


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON.
    """
    try:
        return parse(read_text(path, "a JSON file"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got {error!r}.") from error


def entries(path: Path, key: str | None, **kinds: Kind) -> list[Entry]:
    """The list under a key of a JSON file, or the list that the file is, every entry with these fields.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no such list, or an entry lacks a field or has one of another kind.
    """
    what, found = "a list", read_json(path)
    if key is not None:
        what = f"a list {key!r}"
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list):
        got = "none" if found is None else type(found).__name__
        raise ValueError(f"expected JSON with {what} in {path}, got {got}.")
    return checked(found, path, key or "entries", **kinds)


def json_lines(path: Path, **kinds: Kind) -> list[Entry]:
    """The values of a file of one JSON object a line; empty lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not JSON, lacks a field or has one of another kind.
    """
    found = []
    for number, line in enumerate(lines(path, "a file of JSON lines"), start=1):
        try:
            if line.strip():
                found.append(parse(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON in line {number} of {path}, got {line[:40]!r}.") from error
    return checked(found, path, "lines", **kinds)


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file that has these columns, and maybe others.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column, or a row is longer or shorter than the first.
    """
    try:
        rows = list(csv.reader(io.StringIO(read_text(path, "a CSV file"), newline="")))
    except csv.Error as error:
        raise ValueError(f"expected CSV in {path}, got {error}.") from error
    header = rows[0] if rows else []
    if missing := [column for column in columns if column not in header]:
        raise ValueError(
            f"expected a column {missing[0]!r} in {path}, got {', '.join(header)[:80] or 'an empty file'}."
        )
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise ValueError(f"expected {len(header)} fields in row {number} of {path}, got {len(row)}.")
    return [dict(zip(header, row, strict=True)) for row in rows[1:] if row]


def seconds(path: Path, row: Mapping[str, str], column: str) -> float:
    """A number of a row of CSV.

    Raises:
        ValueError: if it is none.
    """
    try:
        number = float(row[column])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected {column} in {path} to be a number, got {row[column]!r}.")
    return number


def span(path: Path, name: Any, start: float, end: float) -> tuple[float, float]:
    """Begin and end of a part of a video, in seconds.

    Raises:
        ValueError: if they are none.
    """
    if not 0 <= start < end:
        raise ValueError(f"expected 0 <= start < end of {name} in {path}, got {start} and {end}.")
    return start, end


def checked(found: Sequence[Any], path: Path, key: str, **kinds: Kind) -> list[Entry]:
    """Entries, each of them an object that has these fields.

    Raises:
        ValueError: if one is none, lacks a field or has one of another kind.
    """
    for entry in found:
        if not isinstance(entry, dict):
            raise ValueError(f"expected every one of the {key} in {path} to be an object, got {entry!r:.40}.")
    for name, kind in kinds.items():
        for place, entry in enumerate(found):
            if name not in entry:
                raise ValueError(
                    f"expected every one of the {key} in {path} to have {name!r}, which one lacks: "
                    f"number {place + 1}."
                )
            if not kind.holds(entry[name]):
                expect(entry, name, kind, path)
    return list(found)


def expect(entry: Entry, name: str, kind: Kind, path: Path) -> Any:
    """A field of an entry, which has to be of a kind.

    Raises:
        ValueError: if it is of another.
    """
    if not kind.holds(entry.get(name)):
        found = json.dumps(entry.get(name))
        raise ValueError(f"expected {name!r} in {path} to be {kind.name}, got {found:.60}.")
    return entry[name]


def by_id(found: Iterable[T], name: Callable[[T], Any], path: Path) -> dict[Any, T]:
    """Entries by their ids.

    Raises:
        ValueError: if two have one.
    """
    named: dict[Any, T] = {}
    for entry in found:
        if name(entry) in named:
            raise ValueError(f"expected ids that differ in {path}, got two of {name(entry)!r}.")
        named[name(entry)] = entry
    return named


def with_ids(samples: Iterable[Sample], path: Path) -> list[Sample]:
    """Samples whose ids differ.

    Raises:
        ValueError: if two are equal, or there is no sample.
    """
    found = list(by_id(samples, lambda sample: sample.id, path).values())
    if not found:
        raise ValueError(f"expected something to ask in {path}, found nothing.")
    return found


def all_or_none_answered(samples: list[Sample], path: Path) -> list[Sample]:
    """Samples of a split: to leave some out of a score without a word would change what it is of."""
    without = [sample for sample in samples if not sample.references]
    if without and len(without) < len(samples):
        raise ValueError(
            f"expected answers to everything asked in {path} or to none, found none to {without[0].id!r}."
        )
    return samples


class Folder:
    """The images or the videos in a folder and in those below it, found by their names.

    Args:
        path: of the folder.
        suffixes: of the files that count.
        what: "images" or "videos".

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    def __init__(self, path: Path, suffixes: frozenset[str], what: str):
        if not path.is_dir():
            raise FileNotFoundError(f"expected a folder of {what}, found none at {path}.")
        self.path = path
        self._named: dict[str, list[Path]] = {}
        self._numbered: dict[int, list[Path]] = {}
        for file in _below(path):
            if file.suffix.lower() in suffixes:
                self._named.setdefault(file.stem, []).append(file)
                if number := re.search(r"\d+$", file.stem):
                    self._numbered.setdefault(int(number[0]), []).append(file)

    def named(self, *stems: str) -> Path | None:
        """The file that has one of these names without its suffix."""
        return next((self._only(self._named[stem], stem) for stem in stems if stem in self._named), None)

    def numbered(self, number: int) -> Path | None:
        """The file whose name ends in a number."""
        return self._only(self._numbered[number], number) if number in self._numbered else None

    def _only(self, files: list[Path], name: str | int) -> Path:
        if len(files) > 1:
            raise ValueError(
                f"expected one file for {name!r} in {self.path}, got {files[0]} and {files[1]}. Name the "
                "folder that has the right ones."
            )
        return files[0]


def _below(path: Path) -> Iterator[Path]:
    """The files in a folder and below, but hidden ones. Links are followed, to no folder twice."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def images_in(path: Path) -> Folder:
    """The images of a folder."""
    return Folder(path, IMAGES, "images")


def image_file(folder: Path, *names: str) -> Path:
    """The first of some file names that is in a folder.

    Raises:
        FileNotFoundError: if none is.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_file():
            return path
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images, found none at {folder}.")
    raise FileNotFoundError(f"expected an image at {' or '.join(map(str, paths))}, found none.")


class Videos:
    """The videos in a folder and in those below it.

    A video that is not there has the path at which it was looked for: videos of the web vanish, and
    `present` leaves such samples out and says how many.
    """

    def __init__(self, path: Path):
        self._folder = Folder(path, VIDEOS, "videos")

    def find(self, *stems: str) -> Path:
        """The file that has one of these names without its suffix."""
        return self._folder.named(*stems) or self._folder.path / f"{stems[0]}.mp4"

    def segment(self, name: str, video: str, start: float, end: float) -> Path | Segment:
        """A part of a video, or the file of its own name, where it has been cut out."""
        cut = self._folder.named(name)
        return cut or Segment(self.find(video), start, end)


def present(samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose files are on the disk.

    >>> present([Sample(image=Path("gone.mp4"))])
    []
    """
    exists: dict[Path, bool] = {}
    found = []
    for sample in samples:
        path = sample.image.path if isinstance(sample.image, Segment) else sample.image
        if path not in exists:
            exists[path] = path.is_file()
        if exists[path]:
            found.append(sample)
    return found
