"""Tar shards in WebDataset's format: written, listed, and read in any order.

Files of one sample share a name up to its first dot and follow each other; the rest of a name is the kind::

    000000.json  000000.0.png  000000.1.png     a document and its images
    000001.png   000001.txt                     an image and its caption
    000002.0.png 000002.1.png  000002.txt       a clip, frame by frame, and its caption
    000003.mp4   000003.txt                     a clip, as a video file, and its caption

A document's JSON is a list in reading order, of texts and of references to images: `["A dog:", {"image":
"0.png"}]`.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from flamingo.training.tar import members

Sample = dict[str, bytes]  # a kind of file, as "txt", to its content


class Entry(NamedTuple):
    """Where a sample lies: enough to read it, in any process, without its shard's table of contents."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]  # a kind of file to its first byte in the shard and its length

    def read(self) -> Sample:
        """The content of every file.

        Raises:
            ValueError: if the shard has become shorter.
        """
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

    Raises:
        FileNotFoundError: if nothing has the name of a pattern.
    """
    found: set[str] = set()
    for pattern in patterns:
        paths = glob.glob(pattern)
        if not paths:
            raise FileNotFoundError(f"find_shards: expected shards at {pattern}, got none.")
        found.update(paths)
    return sorted(found)


def entries(shard: str) -> list[Entry]:
    """A shard's samples in their order; reads the headers and passes over the contents.

    Files without a kind (`README`) and hidden ones (`._000000.png`) belong to no sample.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the shard is not an uncompressed tar file, is damaged anywhere, or has two files of one
            name in a sample.
    """
    found: list[Entry] = []
    try:
        for member in members(shard):
            key, kind = _split(member.name)
            if not (key and kind):
                continue
            if not found or found[-1].key != key:
                found.append(Entry(shard, key, {}))
            if kind in found[-1].files:
                raise ValueError(f"two files {f'{key}.{kind}'!r} in one sample")
            found[-1].files[kind] = (member.start, member.size)
    except ValueError as error:
        raise ValueError(
            f"entries: expected {shard} to be an uncompressed tar file, whole, got: {error}."
        ) from error
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
