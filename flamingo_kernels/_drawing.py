"""A mask as it is shown: a line for each medium, a character for each token."""

from __future__ import annotations

from torch import Tensor

MOST_TEXTS, MOST_MEDIA, MOST_TOKENS = 2, 16, 96
SEEN, UNSEEN = "#", "."


def draw(lo: Tensor, hi: Tensor, num_media: int) -> list[str]:
    """The first media and tokens of the first texts, and how many more there are.

    Args:
        lo, hi: int32 `[B, T]`, see `MediaMask`.
        num_media: M.

    Returns:
        Lines; none where the tensors have no values to read.
    """
    try:
        spans = [each[:MOST_TEXTS, :MOST_TOKENS].tolist() for each in (lo, hi)]
    except RuntimeError:  # on meta, or while a graph is traced
        return []
    texts = enumerate(zip(*spans, strict=True))
    lines = [line for at, (first, last) in texts for line in _text(at, first, last, num_media)]
    limits = {
        "texts": (lo.shape[0], MOST_TEXTS),
        "tokens": (lo.shape[1], MOST_TOKENS),
        "media": (num_media, MOST_MEDIA),
    }
    left = [f"{what} {most} to {count - 1}" for what, (count, most) in limits.items() if count > most]
    return [*lines, f"not drawn: {', '.join(left)}"] if left else lines


def _text(at: int, lo: list[int], hi: list[int], num_media: int) -> list[str]:
    rows = {
        f"medium {medium}": [first <= medium < last for first, last in zip(lo, hi, strict=True)]
        for medium in range(min(num_media, MOST_MEDIA))
    }
    averages = [last < 0 for last in hi]
    if any(averages):
        rows["averages"] = averages
    lines: list[str] = []
    for name, row in rows.items():
        heading = "" if lines else f"text {at}"
        lines.append(f"{heading:<7} {name:<9} {''.join(SEEN if each else UNSEEN for each in row)}".rstrip())
    return lines
