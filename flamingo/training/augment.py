"""Training images, mirrored and recoloured at random.

The paper names random left/right flips and colour augmentation, and no strengths. Those here, and how often
colours change, are BYOL's.
"""

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1

# Red, green and blue to brightness and two axes of colour; grey has no colour.
_YIQ = torch.tensor([[0.30, 0.59, 0.11], [0.5990, -0.2773, -0.3217], [0.2130, -0.5251, 0.3121]])


def augment(frames: Iterable[Tensor], *, flip: float, colour: float, draw: random.Random) -> list[Tensor]:
    """Mirrors all frames of a medium or none, and recolours them alike.

    Args:
        frames: float32 `[3, h, w]` in 0..1.
        flip: probability that left becomes right, writing included.
        colour: probability that brightness, contrast and saturation are multiplied by 1 - s to 1 + s, s being
            0.4, 0.4 and 0.2, and the hue turns by 0.1 of the circle at most, either way.
        draw: of all that is random.

    Source: arXiv 2204.14198, appendix B.1.2; strengths of arXiv 2006.07733 (BYOL), appendix B.

    >>> (frame,) = augment([torch.eye(2).expand(3, 2, 2)], flip=1.0, colour=0.0, draw=random.Random(0))
    >>> frame[0].tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if draw.random() < flip:
        frames = [frame.flip(-1) for frame in frames]
    if draw.random() < colour:
        brightness, contrast, saturation = (
            1 + draw.uniform(-strength, strength) for strength in (BRIGHTNESS, CONTRAST, SATURATION)
        )
        hue = draw.uniform(-HUE, HUE)
        frames = [recolour(frame, brightness, contrast, saturation, hue) for frame in frames]
    return list(frames)


def recolour(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Colours turned and stretched around grey, then brightness, then contrast around the mean brightness.

    ::

        (y, i, q) = YIQ @ (r, g, b)
        i + j q  ->  saturation * exp(2 pi j hue) * (i + j q)
        x  ->  brightness * x
        x  ->  m + contrast * (x - m)                              m = mean of y

    Args:
        image: float32 `[3, h, w]` in 0..1.
        brightness, contrast, saturation: factors.
        hue: part of the circle.

    Returns:
        float32 `[3, h, w]`, cut to 0..1.

    Determinism: to the bit, with any number of threads.
    """
    cos, sin = saturation * math.cos(2 * math.pi * hue), saturation * math.sin(2 * math.pi * hue)
    turned = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]]) @ _YIQ
    matrix = brightness * torch.linalg.solve(_YIQ, turned)  # [3, 3]
    image = torch.einsum("c d, d h w -> c h w", matrix, image)
    # NumPy adds in one thread, so in one order.
    mean = float(torch.einsum("c, c h w -> h w", _YIQ[0], image).numpy().mean())
    return (mean + contrast * (image - mean)).clamp(0, 1)
