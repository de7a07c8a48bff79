"""One image, whatever its type, channels and orientation, to colours in 0..1.

::

    grey, grey + alpha, RGB, RGBA     uint8, uint16, bool, or floats in 0..1     arrays and tensors
    1  L  P  RGB  CMYK ...            to RGB, or to RGBA where something is transparent     PIL
    I;16  I  F                        as uint16 and floats                       PIL
"""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1, torch.bool: 1}


def to_image(image: Any) -> Tensor:
    """A PIL image, an array or a tensor to colours; what is transparent is put on white.

    Args:
        image: a PIL image of any mode, turned as its EXIF says; an array `[h, w]` or `[h, w, C]`; a tensor
            `[C, h, w]`. C is 1 or 3, and one more for alpha. uint8, uint16, bool, or floats in 0..1. PIL's
            floats may also reach 255 or 65535, as its own `convert("F")` makes them.

    Returns:
        float32 `[3, h, w]` in 0..1.

    Raises:
        ValueError: for another shape or range, or an image that Pillow cannot decode.
        TypeError: if it is no image, or of another type.

    >>> to_image(np.full((1, 1, 4), [255, 0, 0, 0], dtype=np.uint8)).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    if hasattr(image, "convert"):  # PIL, without importing it
        image = _from_pillow(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
        image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
    if not isinstance(image, Tensor):
        raise TypeError(
            "Processor: expected a text, a PIL image, an array, a tensor, bytes, a pathlib.Path or a list of "
            f"these, got {type(image).__name__}."
        )
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4 or 0 in image.shape:
        raise ValueError(
            "Processor: expected an image array (h, w) or (h, w, 3), or a tensor (1, h, w) or (3, h, w), "
            f"with one channel more for alpha, got {tuple(image.shape)} (channels first)."
        )
    image = _in_unit_range(image.detach().cpu())
    if image.shape[0] in (2, 4):
        image, alpha = image[:-1], image[-1:]
        image = image * alpha + (1 - alpha)
    return image.expand(3, -1, -1)


def _in_unit_range(image: Tensor) -> Tensor:
    """float32 in 0..1."""
    if image.dtype in _MOST:
        return image.float().div_(_MOST[image.dtype])
    if not image.is_floating_point():
        raise TypeError(
            f"Processor: expected an image of uint8, uint16, bool or a floating type, got {image.dtype}."
        )
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"Processor: expected a floating image in 0..1, got {image.min():.4g}..{image.max():.4g}. "
            "Divide by 255, or pass uint8."
        )
    return image.float()


def _from_pillow(image: Any) -> np.ndarray:
    """An upright array `[h, w]` or `[h, w, C]` of what `to_image` takes."""
    try:
        image = import_module("PIL.ImageOps").exif_transpose(image)
        if image.mode == "F":
            return _floats(np.asarray(image))
        if image.mode.startswith("I"):
            return _integers(np.asarray(image))
        if image.mode == "La":
            image = image.convert("LA")  # Pillow has no shorter way
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    except Exception as error:  # for a damaged file Pillow raises whatever its reader met
        raise ValueError(f"Processor: expected an image that Pillow can decode: {error}") from error


def _integers(grey: np.ndarray) -> np.ndarray:
    """Pillow holds 16 bits in 32 for some kinds of file."""
    if grey.min() < 0 or grey.max() > _MOST[torch.uint16]:
        raise ValueError(f"integers of 16 bits at most, got {grey.min()}..{grey.max()}")
    return grey.astype(np.uint16)


def _floats(grey: np.ndarray) -> np.ndarray:
    """By the least white that holds them."""
    for white in (1, _MOST[torch.uint8], _MOST[torch.uint16]):
        if grey.min() >= 0 and grey.max() <= white:
            return grey / np.float32(white)
    raise ValueError(f"floats in 0..1, 0..255 or 0..65535, got {grey.min():.4g}..{grey.max():.4g}")
