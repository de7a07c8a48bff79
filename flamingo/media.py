"""Images and clips, in whatever form they come, to frames of one form."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from flamingo.pixels import to_image

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
MAX_PIXELS = 2**30 // 12  # 1 GiB as float32 in three channels; Pillow has the same limit

# Files are told by their content, so what may be read is named. Pillow would give an EPS file to Ghostscript,
# which runs it as a program, and FFmpeg would fetch what a playlist names.
_IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_CONTAINERS = "avi,m4v,matroska,mov,mpeg,mpegts,mpegvideo"


@dataclass(frozen=True)
class Segment:
    """A part of a file of a video, as of a recipe or a film."""

    path: Path
    start: float  # seconds from the video's begin
    end: float  # seconds; what is on show then is no part of it


@dataclass(frozen=True)
class Features:
    """What a frozen vision encoder has made of a medium; it stands for the medium in a document."""

    tensor: Tensor  # [F, v, dim]


def read_frames(
    medium: Any, *, fps: float = 1.0, max_frames: int = 8, max_pixels: int = MAX_PIXELS
) -> Iterator[Tensor]:
    """The frames of an image, of a clip or of a file of either, one by one.

    Args:
        medium: what `Processor` takes as a medium.
        fps, max_frames: of files of videos, see `read_video`.
        max_pixels: of an image or a frame in a file; see `read_image`.

    Yields:
        float32 `[3, h, w]` in 0..1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file cannot be read or is too large, a clip is empty, or an image has a wrong shape
            or range.
        TypeError: if it is none of these.
        ImportError: without Pillow or PyAV where a file needs it.
    """
    if isinstance(medium, Path) and medium.suffix.lower() in VIDEOS:
        yield from read_video(medium, fps=fps, max_frames=max_frames, max_pixels=max_pixels)
        return
    if isinstance(medium, Segment):
        part = {"start": medium.start, "end": medium.end}
        yield from read_video(medium.path, fps=fps, max_frames=max_frames, max_pixels=max_pixels, **part)
        return
    frames = medium if _is_clip(medium) else [medium]
    if len(frames) == 0:
        raise ValueError("Processor: expected a clip of one frame or more, got an empty list.")
    for frame in frames:
        if isinstance(frame, bytes):
            frame = io.BytesIO(frame)
        is_file = isinstance(frame, (Path, io.BytesIO))
        yield read_image(frame, max_pixels=max_pixels) if is_file else to_image(frame)


def read_image(file: Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A file that Pillow can read, upright and in colour, to float32 `[3, h, w]` in 0..1, as by `to_image`.

    Args:
        file: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF, by its content. The first of
            several images is read.
        max_pixels: a larger image is refused before it is decoded: a small file may hold gigabytes. A value
            above `MAX_PIXELS` raises Pillow's own limit too, for the whole process.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if Pillow cannot read it, or it has more pixels.
        ImportError: without Pillow.
    """
    _check_exists(file)
    with _open_image(file, max_pixels) as image:
        _check_size(file, *_decoded_size(image), max_pixels)
        try:
            return to_image(image)
        except ValueError as error:
            raise _unreadable(file, error) from error


def _open_image(file: Path | BinaryIO, max_pixels: int) -> Any:
    """What Pillow makes of the header; nothing is decoded."""
    pillow = _import("PIL.Image", "pillow", "images")
    pillow.init()
    if max_pixels > MAX_PIXELS and pillow.MAX_IMAGE_PIXELS is not None:
        pillow.MAX_IMAGE_PIXELS = max(pillow.MAX_IMAGE_PIXELS, max_pixels)
    try:
        return pillow.open(file, formats=[name for name in _IMAGES if name in pillow.OPEN])
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise _too_large(file, str(error), max_pixels) from error
    except import_module("PIL").UnidentifiedImageError as error:  # it would give the file's place in memory
        raise _unreadable(file, ValueError(f"none of {', '.join(_IMAGES)}")) from error
    except Exception as error:
        raise _unreadable(file, error) from error


def _decoded_size(image: Any) -> tuple[int, int]:
    """Width and height of what a decoder holds at once; in TIFF that may be a tile larger than the image."""
    tags, tile = getattr(image, "tag_v2", {}), (322, 323)
    width, height = (size if isinstance(size := tags.get(tag), int) else 0 for tag in tile)
    return max(image.width, width), max(image.height, height)


def _unreadable(file: Path | BinaryIO, error: Exception) -> ValueError:
    return ValueError(
        f"Processor: expected an image that Pillow can read, got {_name(file)}: "
        f"{str(error).removeprefix('Processor: expected ')}"
    )


def _check_size(file: Path | BinaryIO, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(file, f"{width} x {height}.", max_pixels)


def _too_large(file: Path | BinaryIO, size: str, max_pixels: int) -> ValueError:
    return ValueError(
        f"Processor: expected at most {max_pixels} pixels in an image or a frame, got {_name(file)}: {size} "
        "Raise max_pixels if you trust it."
    )


def read_video(
    file: Path | BinaryIO,
    *,
    fps: float = 1.0,
    max_frames: int = 8,
    max_pixels: int = MAX_PIXELS,
    start: float = 0.0,
    end: float = math.inf,
) -> Iterator[Tensor]:
    """The frames on show at 0, 1 / fps, 2 / fps, ... seconds, until the last frame has begun.

    Args:
        file: AVI, MPEG, MP4, QuickTime, Matroska or WebM, by its content; PyAV, which is FFmpeg, reads it.
        fps: frames a second; 1 in the paper's training, 3 in its evaluation.
        max_frames: where to stop; 8 in the paper's training, 30 in its evaluation.
        max_pixels: a larger frame is refused before it is decoded.
        start, end: seconds of the part that is read; the first frame is the one on show at `start`.

    Yields:
        float32 `[3, h, w]` in 0..1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, has no frame in that part, or one of more pixels.
        ImportError: without PyAV.

    Source: arXiv 2204.14198, appendix B.1.2.
    """
    _check_exists(file)
    if not 0 <= start < end:
        raise ValueError(f"Processor: expected 0 <= start < end in seconds, got {start} and {end}.")
    av = _import("av", "av", "videos")
    taken = 0
    if end < math.inf:
        max_frames = min(max_frames, max(1, math.ceil((end - start) * fps - 1e-6)))
    source = str(file.absolute()) if isinstance(file, Path) else file
    try:
        with av.open(source, options={"format_whitelist": _CONTAINERS}) as container:
            if not container.streams.video:
                raise ValueError(
                    f"Processor: expected a video with frames, got {_name(file)}, which has none."
                )
            stream = container.streams.video[0]
            _check_size(file, stream.width, stream.height, max_pixels)
            # A later frame may be larger. A decoder counts its own margins, hence twice.
            stream.codec_context.options = {"max_pixels": str(2 * max_pixels + 2**20)}
            begin = None
            if start:
                begin = start + (stream.start_time or 0) * float(stream.time_base)
                container.seek(int(begin / stream.time_base), stream=stream)  # to a frame at it or before
            for frame in _at_rate(container.decode(stream), fps, begin):
                _check_size(file, frame.width, frame.height, max_pixels)
                yield to_image(frame.to_ndarray(format="rgb24"))
                taken += 1
                if taken == max_frames:
                    return
    except av.FFmpegError as error:
        raise ValueError(
            f"Processor: expected a video that PyAV can read, got {_name(file)}: {error}"
        ) from error
    if not taken:
        raise ValueError(f"Processor: expected a video with frames, got {_name(file)}, which has none.")


def _at_rate(frames: Iterator[Any], fps: float, begin: float | None = None) -> Iterator[Any]:
    """Frames with times, in order, to the one on show at each tick of 1 / fps seconds.

    Ticks go from the time `begin` on, or from the first frame's.
    """
    shown, start, ticks = None, begin or 0.0, 0
    for frame in frames:
        if shown is None and begin is None:
            start = frame.time
        # A tick within a microsecond of a frame's time, which is rounded, is that frame's.
        while shown is not None and start + ticks / fps < frame.time - 1e-6:
            yield shown
            ticks += 1
        shown = frame
    if shown is not None and start + ticks / fps < shown.time + 1e-6:
        yield shown


def _is_clip(medium: Any) -> bool:
    if isinstance(medium, (np.ndarray, Tensor)):
        return medium.ndim == 4
    return isinstance(medium, (list, tuple))


def _check_exists(file: Path | BinaryIO) -> None:
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError(f"Processor: expected a file, found none at {file}.")


def _name(file: Path | BinaryIO) -> str:
    return str(file) if isinstance(file, Path) else getattr(file, "name", "bytes")


def _import(module: str, package: str, what: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Processor: reading {what} from files needs {package}: pip install {package}."
        ) from error
