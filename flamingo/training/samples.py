"""From the files of a sample to a document that `Processor` takes."""

import io
import json
import random
import re
from collections.abc import Callable, Iterable
from functools import singledispatch
from typing import Any

from torch import Tensor

from flamingo.media import VIDEOS, read_image, read_video
from flamingo.training.augment import augment
from flamingo.training.config import Captioned, Clips, DatasetConfig, Documents, Pairs
from flamingo.training.shards import Sample

IMAGES = ("png", "jpg", "jpeg", "webp")
Encode = Callable[[str], list[int]]


@singledispatch
def to_document(config: DatasetConfig, sample: Sample, encode: Encode, draw: random.Random) -> list[Any]:
    """A sample to a list of texts and media.

    Args:
        config: of the dataset, whose kind says what a sample is.
        sample: its files.
        encode: text to tokens, to measure its length.
        draw: of what is random about the sample.

    Raises:
        ValueError: if a file is missing, cannot be read or is too large.
    """
    raise TypeError(f"to_document: expected Documents, Pairs or Clips, got {type(config).__name__}.")


@to_document.register
def _(config: Documents, sample: Sample, encode: Encode, draw: random.Random) -> list[Any]:
    """A window of a document, see `window`; only the images in it are decoded."""
    if "json" not in sample:
        raise ValueError(f"to_document: expected a document's json, got {', '.join(sample)}.")
    parts = json.loads(sample["json"])
    kept = window(parts, config.length, config.max_images, encode, draw)
    return [part if isinstance(part, str) else _image(config, sample, part["image"], draw) for part in kept]


@to_document.register
def _(config: Pairs, sample: Sample, encode: Encode, draw: random.Random) -> list[Any]:
    kind = next((kind for kind in IMAGES if kind in sample), "png")
    return [_image(config, sample, kind, draw), _caption(config, sample, encode, draw)]


@to_document.register
def _(config: Clips, sample: Sample, encode: Encode, draw: random.Random) -> list[Any]:
    video = next((kind for kind in sample if f".{kind}" in VIDEOS), None)
    if video is None:
        kinds = sorted(
            (kind for kind in sample if kind.endswith(IMAGES)), key=lambda kind: int(kind.split(".")[0])
        )
        frames = [_read(config, sample, kind) for kind in kinds[: config.frames]]
    else:
        file = _File(sample, video)
        frames = list(
            read_video(file, fps=config.fps, max_frames=config.frames, max_pixels=config.max_pixels)
        )
    frames = augment(frames, flip=config.flip, colour=config.colour, draw=draw)
    return [frames, _caption(config, sample, encode, draw)]


def window(parts: list[Any], length: int, max_images: int, encode: Encode, draw: random.Random) -> list[Any]:
    """A random run of a document's words and images that has so many tokens at most.

    A document that is long enough gives a full window: one that would begin near its end begins earlier.

    Args:
        parts: texts, and anything else for an image.
        length: tokens at most, with `<BOS>`, `<EOS>`, and `<EOC>` and `<image>` of every image.
        max_images: more are left out, the first are kept.
        encode: text to tokens.
        draw: of the place.

    >>> window(["one two", None, "three four"], 16, 5, str.encode, random.Random(1))
    [' two', None, 'three']
    """
    units = [unit for part in parts for unit in (_words(part) if isinstance(part, str) else [part])]
    room = length - 3  # <BOS>, the last <EOC>, <EOS>
    start = end = draw.randrange(len(units) + 1)
    while end < len(units) and (cost := _tokens(units[end], encode)) <= room:
        room, end = room - cost, end + 1
    # Only the document's own end lets a window begin earlier; a long word must not.
    while end == len(units) and start > 0 and (cost := _tokens(units[start - 1], encode)) <= room:
        room, start = room - cost, start - 1
    return _join(units[start:end], max_images)


def _words(text: str) -> list[str]:
    """A text in pieces to cut between: words with the space in front of them, long ones in several."""
    return re.findall(r"\s?\S{1,16}|\s", text)


def _tokens(unit: Any, encode: Encode) -> int:
    return len(encode(unit)) if isinstance(unit, str) else 2  # <EOC><image>


def _join(units: Iterable[Any], max_images: int) -> list[Any]:
    """Neighbouring texts become one; images beyond the first few are left out."""
    parts: list[Any] = []
    images = 0
    for unit in units:
        if not isinstance(unit, str):
            images += 1
            if images <= max_images:
                parts.append(unit)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += unit
        else:
            parts.append(unit)
    return parts


def _caption(config: Captioned, sample: Sample, encode: Encode, draw: random.Random) -> str:
    if "txt" not in sample:
        raise ValueError(f"to_document: expected a caption's txt, got {', '.join(sample)}.")
    space = " " if draw.random() < config.space else ""
    room = config.length - 4  # <BOS>, <image>, <EOC>, <EOS>
    kept = ""
    for word in _words(space + sample["txt"].decode().strip()):
        room -= len(encode(word))
        if room < 0:
            break
        kept += word
    return kept


class _File(io.BytesIO):
    """A file of a sample, open, with what errors call it."""

    def __init__(self, sample: Sample, kind: str):
        super().__init__(sample[kind])
        self.name = kind


def _image(config: Documents | Pairs, sample: Sample, kind: str, draw: random.Random) -> Tensor:
    (image,) = augment([_read(config, sample, kind)], flip=config.flip, colour=config.colour, draw=draw)
    return image


def _read(config: DatasetConfig, sample: Sample, kind: str) -> Tensor:
    if kind not in sample:
        raise ValueError(f"to_document: expected an image {kind}, got {', '.join(sample)}.")
    return read_image(_File(sample, kind), max_pixels=config.max_pixels)
