"""What encoders ask of their pixels, and how they take them."""

import torch
from torch import Tensor, nn


def expect_frames(encoder: nn.Module, pixels: Tensor, side: int) -> None:
    """Raise ValueError unless pixels is `[B, M, F, 3, side, side]`."""
    if pixels.ndim != 6 or pixels.shape[3:] != (3, side, side):
        raise ValueError(
            f"{type(encoder).__name__}: expected pixels with shape (B, M, F, 3, {side}, {side}), got "
            f"{tuple(pixels.shape)}. Processor(image_size={side}) makes them."
        )


def as_images(
    encoder: nn.Module,
    pixels: Tensor,  # [B, M, F, 3, h, w]
    dtype: torch.dtype,
) -> Tensor:  # [B * M * F, 3, h, w]
    """Each frame as an image, in the dtype of the encoder's weights: Processor knows none but float32.

    Raises:
        TypeError: pixels are integers, as of a file, which nobody has normalised.
    """
    if not pixels.is_floating_point():
        raise TypeError(
            f"{type(encoder).__name__}: expected floating-point pixels, got {pixels.dtype}. "
            "Processor makes them."
        )
    return pixels.flatten(0, 2).to(dtype)
