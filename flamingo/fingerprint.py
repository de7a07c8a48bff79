"""What tells two encoders, two ways of preprocessing or two media apart, to know what was kept of them."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.media import Features, Segment, read_frames
from flamingo.processor import Processor


def of_weights(module: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """A hash of a module's weights as it computes with them, and of what it says that they do not show.

    Args:
        module: a vision encoder, or another module; its attribute `settings` is hashed too, if it has one.
        dtype: what its numbers are rounded to before it computes; None for what they are.
    """
    digest = hashlib.sha256(json.dumps(getattr(module, "settings", {})).encode())
    for name, value in module.state_dict().items():
        value = value.detach().cpu()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        digest.update(f"{name} ".encode())
        _add(digest, value)
    return digest.hexdigest()


def of_preprocessing(processor: Processor, **more: Any) -> str:
    """How a processor makes pixels of an image, and whatever else decides them, as JSON."""
    return json.dumps(
        {
            "image_size": processor.image_size,
            "mean": processor.mean.flatten().tolist(),
            "std": processor.std.flatten().tolist(),
            "fit": processor.fit,
            "resample": processor.resample,
            **more,
        }
    )


def of_medium(medium: Any, processor: Processor) -> str:
    """A hash of a medium's content: of a file's bytes, else of the pixels.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `Processor`, for a medium it cannot read.
    """
    digest = hashlib.sha256()
    if isinstance(medium, Features):
        digest.update(b"features ")
        _add(digest, medium.tensor.detach().cpu())
    elif isinstance(medium, Segment):
        digest.update(f"segment {medium.start} {medium.end} {_of_file(medium.path)}".encode())
    elif isinstance(medium, Path):
        return _of_file(medium)
    elif isinstance(medium, bytes):
        digest.update(b"bytes ")
        digest.update(medium)
    else:
        digest.update(b"pixels ")
        for frame in read_frames(medium, max_pixels=processor.max_pixels):
            _add(digest, frame)
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"Processor: expected a file, found none at {path}.")
    about = path.stat()
    return _of_bytes(path.absolute(), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _of_bytes(path: Path, *_stamp: int) -> str:
    """A hash of a file that is not read again while it stays as it is: a video may have many segments."""
    digest = hashlib.sha256(f"file {path.suffix.lower()} ".encode())  # which tells videos from images
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
