"""From the files of a sample to a document that `Processor` takes."""

import io
import random
import re
from collections.abc import Callable, Iterable
from functools import singledispatch
from typing import Any

from torch import Tensor

from flamingo.media import read_image, read_video
from flamingo.tokenizer import EOC
from flamingo.training.augment import augment
from flamingo.training.config import Captioned, Clips, DatasetConfig, Documents, Pairs
from flamingo.training.files import File, find_caption, find_clip, find_image, find_pictures
from flamingo.training.layouts import read_layout
from flamingo.training.shards import Sample

Encode = Callable[[str], list[int]]
Show = Callable[[DatasetConfig, list[File], random.Random], Any]


@singledispatch
def parts_of(config: DatasetConfig, sample: Sample) -> list[str | list[File]]:
    """A sample's texts and media in reading order; a medium is the files of its frames, or of its video.

    Args:
        config: of the dataset, whose kind says what a sample is.
        sample: its files.

    Raises:
        ValueError: if a file is missing or says nothing that is known.
    """
    raise TypeError(f"parts_of: expected Documents, Pairs or Clips, got {type(config).__name__}.")


@parts_of.register
def _(config: Documents, sample: Sample) -> list[str | list[File]]:
    if "json" not in sample:
        raise ValueError(f"expected a document's json, got {', '.join(sample)}.")
    parts = read_layout(sample["json"], min_similarity=config.min_similarity)
    return find_pictures(parts, sample, config.images)


@parts_of.register
def _(config: Pairs, sample: Sample) -> list[str | list[File]]:
    return [[find_image(sample)], find_caption(sample)]


@parts_of.register
def _(config: Clips, sample: Sample) -> list[str | list[File]]:
    return [find_clip(sample, frames=config.frames), find_caption(sample)]


def decode(config: DatasetConfig, files: list[File], draw: random.Random) -> Tensor | list[Tensor]:
    """An image, or the frames of a clip, augmented.

    Raises:
        ValueError: if a file cannot be read or is too large.
    """
    frames = [frame for file in files for frame in read_file(config, file)]
    frames = augment(frames, flip=config.flip, colour=config.colour, draw=draw)
    return frames if isinstance(config, Clips) else frames[0]


def read_file(config: DatasetConfig, file: File) -> list[Tensor]:
    """The image, or the frames of the video, that is in a file."""
    opened = io.BytesIO(file.content)
    opened.name = file.name  # for errors
    if isinstance(config, Clips) and file.is_video:
        return list(
            read_video(opened, fps=config.fps, max_frames=config.frames, max_pixels=config.max_pixels)
        )
    return [read_image(opened, max_pixels=config.max_pixels)]


def to_document(
    config: DatasetConfig, sample: Sample, encode: Encode, draw: random.Random, show: Show = decode
) -> list[Any]:
    """A sample to a list of texts and media.

    Of a document it is a window, see `window`, and only the images in it are shown; of a caption as much as
    fits.

    Args:
        config, sample: see `parts_of`.
        encode: text to tokens, to measure its length.
        draw: of what is random about the sample.
        show: the files of a medium to what stands for it.

    Raises:
        ValueError: if a file is missing, cannot be read or is too large.
    """

    def measure(text: str) -> list[int]:
        return [id for piece in _plain(text) for id in encode(piece)]

    parts = parts_of(config, sample)
    if isinstance(config, Documents):
        parts = window(parts, config.length, config.max_images, measure, draw)
        if not parts:
            raise ValueError(f"expected length to leave room for a word, got length = {config.length}.")
    document: list[Any] = []
    for part in parts:
        if not isinstance(part, str):
            # Whatever is drawn for it, what follows is the same.
            document.append(show(config, part, random.Random(draw.random())))
        elif isinstance(config, Captioned):
            document += _plain(_shortened(config, part, measure, draw))
        else:
            document += _plain(part)
    return document


def _plain(text: str) -> list[str]:
    """A text in pieces in which `<EOC>` is no token: one that a page spells out is taken apart."""
    return re.split(f"(?<={EOC[0]})(?={EOC[1:]})", text)


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


def _shortened(config: Captioned, caption: str, encode: Encode, draw: random.Random) -> str:
    space = " " if draw.random() < config.space else ""
    room = config.length - 4  # <BOS>, <image>, <EOC>, <EOS>
    kept = ""
    for word in _words(space + caption):
        room -= len(encode(word))
        if room < 0:
            break
        kept += word
    if not kept.strip():
        raise ValueError(
            f"expected length to leave room for a word of the caption {caption[:40]!r}, got length = "
            f"{config.length}."
        )
    return kept
