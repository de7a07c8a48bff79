"""RICES: retrieval of the shots whose images look like the query's (arXiv 2109.05014)."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.fewshot.scoring import batches
from flamingo.processor import Processor


@torch.no_grad()
def image_embeddings(
    vision: nn.Module, processor: Processor, media: Sequence, *, batch_size: int = 32
) -> Tensor:
    """The mean feature of each medium, made length 1.

    Args:
        vision: a frozen vision encoder, as `model.vision`.
        processor: its preprocessing.
        media: N images or clips.
        batch_size: how many are encoded at once.

    Returns:
        float32 `[N, dim]`.

    Source: arXiv 2204.14198, appendix B.1.5.

    >>> vision = VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2)
    >>> image_embeddings(vision, Processor(image_size=16), [torch.zeros(3, 8, 8)] * 3).shape
    torch.Size([3, 12])
    """
    device = next(vision.parameters()).device
    embeddings = [torch.zeros(0, cast(int, vision.dim))]
    for some in batches(media, batch_size):
        clips = [[processor.clip(medium)] for medium in some]
        pixels, _ = processor.pad_clips(clips)
        features = vision(pixels.to(device)).float().mean(dim=-2)[:, 0]  # [n, F, dim]
        frames = [feature[: len(clip)].mean(dim=0) for feature, (clip,) in zip(features, clips, strict=True)]
        embeddings.append(F.normalize(torch.stack(frames), dim=-1).cpu())
    return torch.cat(embeddings)


def nearest(query: Tensor, keys: Tensor, n: int) -> Tensor:
    """The n keys most like the query, the most like last, so that it stands right before the query.

    Args:
        query: `[..., dim]` of length 1.
        keys: `[N, dim]` of length 1.
        n: N at most.

    Returns:
        int64 `[..., n]`, ascending in cosine similarity; of equals the earlier key counts as more like.

    Raises:
        ValueError: if there are fewer than n keys.

    Source: arXiv 2204.14198, appendix B.1.5.

    >>> nearest(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), 2).tolist()
    [2, 1]
    """
    if n > len(keys):
        raise ValueError(f"nearest: expected at most {len(keys)} neighbours, one for each key, got n={n}.")
    order = (query @ keys.T).argsort(dim=-1, descending=True, stable=True)
    return order[..., :n].flip(-1)
