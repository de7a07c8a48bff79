"""The files of a sample's images, videos and captions: in its shard, in its json, or in a folder."""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flamingo.json_lines import parse
from flamingo.media import VIDEOS
from flamingo.training.layouts import Picture
from flamingo.training.shards import Sample

# In the order in which a sample with several is asked for one.
IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm")
_CAPTIONS = ("txt", "text", "caption")
_NUMBERED = re.compile(rf"(\d+)\.({'|'.join(IMAGES)})")


class File(NamedTuple):
    """A file of an image or a video."""

    name: str
    content: bytes

    @property
    def is_video(self) -> bool:
        return Path(f"_.{self.name}").suffix in VIDEOS


def find_image(sample: Sample) -> File:
    """The image of a pair.

    Raises:
        ValueError: if there is none.
    """
    kind = next((kind for kind in IMAGES if kind in sample), None)
    if kind is None:
        raise ValueError(f"expected an image ({', '.join(IMAGES[:3])}, ...), got {_kinds(sample)}.")
    return File(kind, sample[kind])


def find_clip(sample: Sample, *, frames: int) -> list[File]:
    """A video, or the first frames, by their numbers, of a clip that is images.

    Raises:
        ValueError: if there is neither.
    """
    video = next((kind for kind in sample if f".{kind}" in VIDEOS), None)
    kinds = [video] if video is not None else _numbered(sample)[:frames]
    if not kinds:
        raise ValueError(f"expected a video (mp4, webm, ...) or frames (0.png, ...), got {_kinds(sample)}.")
    return [File(kind, sample[kind]) for kind in kinds]


def find_caption(sample: Sample) -> str:
    """A caption's file, or `caption` in a pair's json.

    Raises:
        ValueError: if there is none, it is empty, or no UTF-8.
    """
    kind = next((kind for kind in _CAPTIONS if kind in sample), None)
    known = parse(sample["json"]) if kind is None and "json" in sample else None
    caption = sample[kind].decode("utf-8-sig") if kind else isinstance(known, dict) and known.get("caption")
    if not isinstance(caption, str):
        raise ValueError(f"expected a caption (txt, or in the json), got {_kinds(sample)}.")
    if not caption.strip():
        raise ValueError("expected a caption, got an empty one.")
    return caption.strip()


def find_pictures(
    parts: Sequence[str | Picture], sample: Sample, folder: str | None
) -> list[str | list[File]]:
    """A document's parts with the files of its images: a file for each.

    A page of MMC4 or OBELICS whose image was not downloaded goes without it, if it has another.

    Raises:
        ValueError: if a file is not there, or if none of a page's is.
    """
    found: list[str | list[File]] = []
    missing: list[Picture] = []
    for part in parts:
        file = part if isinstance(part, str) else _find(part, sample, folder)
        if isinstance(file, str):
            found.append(file)
        elif file is not None:
            found.append([file])
        elif isinstance(part, Picture):
            missing.append(part)
    pictures = sum(isinstance(part, Picture) for part in parts)
    if any(picture.number is None for picture in missing) or 0 < len(missing) == pictures:
        raise ValueError(
            f"expected an image {missing[0].name[:100]} in the sample{f' or in {folder}' if folder else ''}, "
            f"got {', '.join(sample)}. Put its file into the shard, or into a folder that the dataset's key "
            "images names."
        )
    return found


def _find(picture: Picture, sample: Sample, folder: str | None) -> File | None:
    if picture.base64 is not None:
        return File(picture.name, _decoded(picture.base64))
    if picture.name.lower() in sample:
        return File(picture.name, sample[picture.name.lower()])
    kinds = _numbered(sample) or [kind for kind in IMAGES if kind in sample]
    if picture.number is not None and len(kinds) == picture.total:  # of fewer nobody knows which is which
        return File(kinds[picture.number], sample[kinds[picture.number]])
    path = None if folder is None else _inside(Path(folder), picture.name)
    return None if path is None else File(str(path), path.read_bytes())


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2])  # a data URI has its type before a comma
    except binascii.Error as error:
        raise ValueError(f"expected an image in base64, got {text[:20]!r}: {error}") from error


def _inside(folder: Path, name: str) -> Path | None:
    """A file in a folder, which no name of a page can leave."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or len(name) > 255:
        return None
    return folder / name if (folder / name).is_file() else None


def _numbered(sample: Sample) -> list[str]:
    """Kinds like `0.png`, by their numbers."""
    found = [(int(match[1]), kind) for kind in sample if (match := _NUMBERED.fullmatch(kind))]
    return [kind for _, kind in sorted(found)]


def _kinds(sample: Sample) -> str:
    return f"{', '.join(sample) or 'no file'} (the files of a sample must follow each other)"
