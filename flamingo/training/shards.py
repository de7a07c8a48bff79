"""Shards of samples: written, listed, and read in any order.

A shard is a tar file in WebDataset's format. Files of one sample share a name up to its first dot and follow
each other; the rest of a name is the kind::

    000000.json  000000.0.png  000000.1.png     a document and its images
    000001.jpg   000001.txt    000001.json      an image, its caption, and what else is known of it
    000002.0.png 000002.1.png  000002.txt       a clip, frame by frame, and its caption
    000003.mp4   000003.txt                     a clip, as a video file, and its caption

or a `.jsonl` file, in which every line is a sample's json. `layouts` says what a document's json may be.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flamingo.training.bad import DataError
from flamingo.training.braces import expand
from flamingo.training.tar import members

Sample = dict[str, bytes]  # a kind of file, as "txt", to its content

# Of shards in a folder. Those that are compressed are found, to be refused and not passed over.
_ENDINGS = (
    ".tar",
    ".jsonl",
    ".tgz",
    *(f".{kind}.{packed}" for kind in ("tar", "jsonl") for packed in ("gz", "bz2", "xz", "zst")),
)


@dataclass
class Entry:
    """Where a sample lies: enough to read it, in any process, without its shard's table of contents."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]  # a kind of file to its first byte in the shard and its length
    fault: str = ""  # why it cannot be read

    def read(self) -> Sample:
        """The content of every file.

        Raises:
            ValueError: if one has none, or the shard has become shorter.
        """
        if self.fault:
            raise ValueError(f"expected files with a content each in {self.shard}, got: {self.fault}.")
        with open(self.shard, "rb") as shard:
            sample = {}
            for kind, (start, length) in self.files.items():
                shard.seek(start)
                sample[kind] = shard.read(length)
                if len(sample[kind]) < length:
                    raise ValueError(
                        f"expected {length} bytes of {kind}, got {len(sample[kind])}: the shard has changed."
                    )
        return sample


def find_shards(patterns: Iterable[str]) -> list[str]:
    """Paths of shards, sorted.

    Args:
        patterns: names of files; `*`, `?` and `[...]` as in a shell, and braces, see `expand`; of a folder
            the files `*.tar` and `*.jsonl` in it, and compressed ones, which `entries` refuses.

    Raises:
        FileNotFoundError: if nothing has a name that a pattern stands for.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else expand(pattern)
        paths = {name: _paths(name) for name in names}
        missing = [name for name in names if not paths[name]]
        if missing:
            raise FileNotFoundError(_nothing(pattern, names, missing))
        found.update(path for each in paths.values() for path in each)
    return sorted(found)


def _paths(name: str) -> list[str]:
    """The shards of a name: its own, those that match it, those in the folders among these."""
    matches = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
    return [path for match in matches for path in (_shards_in(match) if os.path.isdir(match) else [match])]


def _shards_in(folder: str) -> list[str]:
    inside = glob.escape(folder)
    return [path for ending in _ENDINGS for path in glob.glob(os.path.join(inside, f"*{ending}"))]


def _nothing(pattern: str, names: list[str], missing: list[str]) -> str:
    """What a pattern stands for that is not there."""
    if names == [pattern]:
        return f"find_shards: expected shards at {pattern}, got none."
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"find_shards: expected shards at {pattern}, whose braces stand for {len(names)} names, {names[0]} "
        f"to {names[-1]}; got none at {len(missing)} of them: {shown}."
    )


def entries(shard: str) -> list[Entry]:
    """A shard's samples in their order; reads the headers and passes over the contents.

    Files without a kind (`README`) and hidden ones (`._000000.png`) belong to no sample. A sample with two
    files of one name, or with one that has no content of its own (a sparse file, a symbolic link), has a
    fault.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if the shard is not an uncompressed tar file, or is damaged anywhere.
    """
    if shard.endswith(".jsonl"):
        return _lines(shard)
    found: list[Entry] = []
    try:
        for member in members(shard):
            key, kind = _split(member.name)
            if not (key and kind):
                continue
            if not found or found[-1].key != key:
                found.append(Entry(shard, key, {}))
            fault = (
                f"two files {f'{key}.{kind}'!r} in one sample" if kind in found[-1].files else member.fault
            )
            found[-1].fault = found[-1].fault or fault
            found[-1].files[kind] = (member.start, member.size)
    except ValueError as error:
        raise DataError(
            f"entries: expected {shard} to be an uncompressed tar file, whole, got: {error}."
        ) from error
    return found


def _lines(shard: str) -> list[Entry]:
    """A sample for each line that is not empty, with its number, from 1 on, as its key."""
    found, start = [], 0
    with open(shard, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(Entry(shard, str(number), {"json": (start, len(line))}))
            start += len(line)
    return found


def _split(name: str) -> tuple[str, str]:
    """A file's name to the sample's key, which may have folders, and the kind of file; either may be ""."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return stem and f"{folder}{slash}{stem}", kind.lower()


def write_shards(
    folder: str | Path, samples: Iterable[Sample], *, samples_per_shard: int = 1000
) -> list[Path]:
    """Writes samples to `folder/000000.tar` and so on.

    Args:
        folder: made if it does not exist.
        samples: of `document_sample`, `pair_sample` and `clip_sample`, or any files by kind.
        samples_per_shard: of all shards but the last.

    Returns:
        The shards. One that exists is whole: it gets its name when it is finished.

    Determinism: the same samples give the same bytes.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     samples = (pair_sample(Image.new("RGB", (8, 8)), f"caption {i}") for i in range(3))
    ...     shards = write_shards(folder, samples, samples_per_shard=2)
    ...     [len(entries(str(shard))) for shard in shards]
    [2, 1]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    shards: list[Path] = []
    while chunk := list(islice(remaining, samples_per_shard)):
        shards.append(folder / f"{len(shards):06d}.tar")
        unfinished = shards[-1].with_suffix(".unfinished")
        with tarfile.open(unfinished, "w") as tar:
            for number, sample in enumerate(chunk):
                for kind, content in sample.items():
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(unfinished, shards[-1])
    return shards


def document_sample(document: Sequence[Any]) -> Sample:
    """A list of texts and PIL images to the files of a sample; images are kept without loss."""
    parts: list[Any] = []
    images: Sample = {}
    for part in document:
        if isinstance(part, str):
            parts.append(part)
        else:
            kind = f"{len(images)}.png"
            images[kind] = _png(part)
            parts.append({"image": kind})
    return {"json": json.dumps(parts).encode(), **images}


def pair_sample(image: Any, caption: str) -> Sample:
    """A PIL image and its caption to the files of a sample."""
    return {"png": _png(image), "txt": caption.encode()}


def clip_sample(frames: Iterable[Any], caption: str) -> Sample:
    """PIL images, the frames of a clip, and its caption to the files of a sample."""
    return {**{f"{i}.png": _png(frame) for i, frame in enumerate(frames)}, "txt": caption.encode()}


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
