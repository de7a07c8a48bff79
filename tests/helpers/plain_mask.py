"""Which media a row sees, in the words of the documentation and without tensors."""

from __future__ import annotations


def seen(time: int, num_media: int, immediate: bool) -> list[int]:
    """The media that a row with this text_time sees."""
    media = range(num_media)
    return [m for m in media if (m + 1 == time if immediate else m + 1 <= time)]


def averages(time: int, num_media: int, immediate: bool, policy: str) -> bool:
    """Whether the row averages all values instead."""
    if policy == "zero" or num_media == 0:
        return False
    return time > num_media if immediate else time <= 0
