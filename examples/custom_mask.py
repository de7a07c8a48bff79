"""A mask of your own on the operator: several documents packed into one row of text.

    python examples/custom_mask.py

Takes a few seconds. Text sees the images of its own document alone: the last one before it, or the last two.
Both masks are made of spans, so that what is not seen is never computed. It prints them, compares the
operator with PyTorch's attention over the same masks written out densely, and says how long both took.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_kernels import MediaMask, masked_cross_attention

# "." is a token of text, "i" an image. All documents lie in one row, one after the other.
DOCUMENTS = ("..i....i...", "...", ".i...i..i..")
COPIES = 16  # of these documents, for the timing
HEADS, HEAD_DIM, LATENTS = 8, 64, 64


def images_before(documents: tuple[str, ...]) -> list[tuple[int, int]]:
    """For every token of the row, the images of its own document up to it, as a span `first <= m < end`."""
    spans, first = [], 0
    for document in documents:
        for position in range(1, len(document) + 1):
            spans.append((first, first + document[:position].count("i")))
        first += document.count("i")
    return spans


def last_image(documents: tuple[str, ...]) -> MediaMask:
    """Text sees the last image of its own document, numbered from 1 in the whole row; 0 stands for none."""
    number = [end if end > first else 0 for first, end in images_before(documents)]
    return MediaMask.from_text_time(torch.tensor([number]), "".join(documents).count("i"))


def last_two_images(documents: tuple[str, ...]) -> MediaMask:
    """Any rule will do in which a token sees a run of images: here the last two of its own document."""
    visible = torch.zeros(1, len("".join(documents)), "".join(documents).count("i"), dtype=torch.bool)
    for token, (first, end) in enumerate(images_before(documents)):
        visible[0, token, max(first, end - 2) : end] = True
    return MediaMask.from_dense(visible, max_latents=1)  # a column of `visible` is an image


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The same by PyTorch, with a mask `[B, 1, T, M * R]` that says it for every pair of token and key."""
    q, k, v = (each.transpose(1, 2) for each in (q, k.flatten(1, 2), v.flatten(1, 2)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    sees_any = visible.any(-1, keepdim=True)
    return torch.where(sees_any, out, 0).transpose(1, 2)  # a token without an image gets 0


def milliseconds(call: Callable[[], Tensor], times: int = 10) -> float:
    """The median of some calls."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)[times // 2]


def compare(mask: MediaMask) -> None:
    tokens, images = mask.lo.shape[1], mask.num_media
    torch.manual_seed(0)
    q = torch.randn(1, tokens, HEADS, HEAD_DIM)
    k, v = torch.randn(2, 1, images, LATENTS, HEADS, HEAD_DIM)
    visible = mask.dense(LATENTS)
    difference = (masked_cross_attention(q, k, v, mask) - dense_attention(q, k, v, visible)).abs().max()
    fast = milliseconds(lambda: masked_cross_attention(q, k, v, mask))
    slow = milliseconds(lambda: dense_attention(q, k, v, visible))
    print(f"{tokens} tokens, {images} images: {fast:.2f} ms, dense {slow:.2f} ms")
    print(f"largest difference: {float(difference):.1e}")


def main(copies: int = COPIES) -> None:
    for mask_of in (last_image, last_two_images):
        print(mask_of(DOCUMENTS))
        compare(mask_of(DOCUMENTS * copies))


if __name__ == "__main__":
    main()
