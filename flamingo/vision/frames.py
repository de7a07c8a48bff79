"""What encoders of one frame size ask of their pixels."""

from torch import Tensor, nn


def expect_frames(encoder: nn.Module, pixels: Tensor, side: int) -> None:
    """Raise ValueError unless pixels is `[B, M, F, 3, side, side]`."""
    if pixels.ndim != 6 or pixels.shape[3:] != (3, side, side):
        raise ValueError(
            f"{type(encoder).__name__}: expected pixels with shape (B, M, F, 3, {side}, {side}), got "
            f"{tuple(pixels.shape)}. Processor(image_size={side}) makes them."
        )
