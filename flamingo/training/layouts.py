"""A document's json, in the layouts that people have, to texts and images in reading order.

::

    ours      ["A dog:", {"image": "0.png"}, "and a cat."]
    MMC4      {"text_list": ["A dog.", "A cat."], "similarity_matrix": [[0.3, 0.1]],
               "image_info": [{"image_name": "a.jpg", "matched_text_index": 0, "matched_sim": 0.3}]}
    OBELICS   {"texts": ["A dog:", null], "images": [null, "https://a.example/a.jpg"]}

An image may stand in the json itself, in base64: MMC4's as `image_base64`, as open_flamingo writes it;
OBELICS' as such, as a data URI, or as `{"bytes": ..., "path": ...}`. `files` looks for the others.
"""

from math import inf
from typing import Any, NamedTuple

from flamingo.json_lines import parse

# How a data URI, and JPEG, PNG, GIF and WebP in base64, begin.
_BASE64 = ("data:", "/9j/", "iVBOR", "R0lGOD", "UklGR")


class Picture(NamedTuple):
    """An image that a document names."""

    name: str  # of its file
    base64: str | None = None  # its content
    number: int | None = None  # among the `total` images of a document whose files may be numbered instead
    total: int = 0


def read_layout(content: bytes, *, min_similarity: float) -> list[str | Picture]:
    """A document's parts.

    Args:
        content: json of one of the layouts.
        min_similarity: MMC4's images that are less like their text are left out.

    Raises:
        ValueError: if it is no json, of no known layout, or a layout's fields do not fit together.
    """
    page = parse(content)
    if isinstance(page, list):
        parts = [_ours(part) for part in page]
    elif isinstance(page, dict) and {"text_list", "image_info"} <= page.keys():
        parts = _mmc4(page, min_similarity)
    elif isinstance(page, dict) and {"texts", "images"} <= page.keys():
        parts = _obelics(page)
    else:
        got = f"the keys {', '.join(page) or 'of nothing'}" if isinstance(page, dict) else type(page).__name__
        raise ValueError(
            "expected a document's json as a list of texts and images, with MMC4's text_list and image_info, "
            f"or with OBELICS' texts and images, got {got}."
        )
    if not parts:
        raise ValueError("expected a document with texts or images, got none.")
    return parts


def _ours(part: Any) -> str | Picture:
    if isinstance(part, str):
        return part
    name = part.get("image") if isinstance(part, dict) else None
    if not isinstance(name, str):
        raise ValueError(f'expected a text or {{"image": name}} in a document, got {str(part)[:60]}.')
    return Picture(name)


def _mmc4(page: dict[str, Any], min_similarity: float) -> list[str | Picture]:
    """Sentences, joined by spaces; an image stands before the one that it was matched with."""
    sentences, infos = _list_of(page, "text_list", str), _list_of(page, "image_info", dict, type(None))
    before: dict[int, list[Picture]] = {}
    for number, info in enumerate(infos):
        if info is not None:
            place, similarity = _match(page, number, info, len(sentences))
            if similarity is None or similarity >= min_similarity:
                name, content = _text(info.get("image_name")), _text(info.get("image_base64"))
                picture = Picture(name or f"number {number}", content, number, len(infos))
                before.setdefault(place, []).append(picture)
    parts: list[str | Picture] = []
    for place, sentence in enumerate(sentences):
        parts += [*before.get(place, []), sentence]
    return _joined(parts, " ")


def _match(page: dict[str, Any], number: int, info: dict[str, Any], count: int) -> tuple[int, float | None]:
    """Which sentence an image belongs to, and how like it they are, if it is said."""
    matrix = page.get("similarity_matrix")
    row = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    if row is not None and not (
        isinstance(row, list)
        and len(row) == count
        and all(isinstance(each, (int, float)) and abs(each) < inf for each in row)
    ):
        raise ValueError(f"expected a similarity_matrix of numbers, one for each of {count} texts in a row.")
    place = info.get("matched_text_index")
    if place is None and row:
        place = row.index(max(row))
    if type(place) is not int or not 0 <= place < count:
        raise ValueError(f"expected a matched_text_index below {count}, got {place!r:.40}.")
    similarity = info.get("matched_sim", row[place] if row else None)
    if not (similarity is None or (isinstance(similarity, (int, float)) and abs(similarity) < inf)):
        raise ValueError(f"expected a matched_sim that is a number, got {similarity!r:.40}.")
    return place, similarity


def _obelics(page: dict[str, Any]) -> list[str | Picture]:
    """At each place a text or an image; texts that follow each other are paragraphs."""
    texts = _list_of(page, "texts", str, type(None))
    images = _list_of(page, "images", str, dict, type(None))
    if len(texts) != len(images):
        raise ValueError(f"expected as many texts as images, got {len(texts)} and {len(images)}.")
    count = sum(image is not None for image in images)
    numbers = iter(range(count))
    parts: list[str | Picture] = []
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            name, content = _of_obelics(image)
            parts.append(Picture(name, content, next(numbers), count))
        if text is not None:
            parts.append(text)
    return _joined(parts, "\n\n")


def _of_obelics(image: str | dict[str, Any]) -> tuple[str, str | None]:
    """An image's name, and its content if it has one."""
    if isinstance(image, dict):
        return _text(image.get("path")) or "without a path", _text(image.get("bytes"))
    return ("in base64", image) if image.startswith(_BASE64) else (image, None)


def _list_of(page: dict[str, Any], key: str, *kinds: type) -> list[Any]:
    value = page[key]
    wrong = [each for each in value if not isinstance(each, kinds)] if isinstance(value, list) else [value]
    if wrong:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"expected {key} to be a list of {names}, got {str(wrong[0])[:60]!r}.")
    return value


def _joined(parts: list[str | Picture], between: str) -> list[str | Picture]:
    """Texts that follow each other as one, without those that are empty."""
    found: list[str | Picture] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, str) and isinstance(before, str):
            found[-1] = f"{before}{between}{part}" if part.strip() else before
        elif not isinstance(part, str) or part.strip():
            found.append(part)
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
