"""Documents of interleaved text and images to the tensors a Flamingo takes."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.media import MAX_PIXELS, Features, read_frames
from flamingo.modules import text_time
from flamingo.tokenizer import IMAGE, ByteTokenizer, Tokenizer


class Batch(NamedTuple):
    """Documents padded to one length and one number of media."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # bool [B, T], False at padding
    pixels: Tensor  # float32 [B, M, F, 3, image_size, image_size], or features [B, M, F, v, dim]
    num_media: Tensor  # int64 [B], the rest of M is padding
    num_frames: Tensor | None  # int64 [B, M] where clips differ in length, else None
    media_starts: Tensor  # bool [B, T], True where the text that sees the next medium begins
    labels: Tensor  # int64 [B, T], input_ids, and -100 at `<image>`, the first token and padding

    @property
    def spans(self) -> Tensor:
        """Which tokens see which medium: `start <= t < end`, int64 `[B, M, 2]`; (0, 0) for padding.

        >>> Processor(image_size=8)([["a", torch.zeros(3, 8, 8), "b", torch.zeros(3, 8, 8)]]).spans.tolist()
        [[[3, 6], [6, 9]]]
        """
        times = text_time(self.media_starts) * self.attention_mask
        media = torch.arange(1, self.pixels.shape[1] + 1, device=times.device)
        seen = (times[..., None] == media).long()  # [B, T, M]
        if not seen.shape[1]:
            return seen.new_zeros(*seen.shape[::2], 2)
        start = seen.argmax(dim=1)
        return torch.stack((start, start + seen.sum(dim=1)), dim=-1)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {name: x.to(device) for name, x in self._asdict().items() if x is not None}
        return self._replace(**tensors)


class Layout(NamedTuple):
    """A document's tokens, and its media as they were given, one for each `<image>`."""

    ids: list[int]
    media: list[Any]


class Processor:
    """Turns documents into a `Batch`.

    A document is a list of texts and media in reading order, or a tuple `(text, list of media)` whose text
    has one `<image>` for every medium. A medium is an image, or a list of images: the frames of a clip. An
    image is a PIL image, an array `[h, w]` or `[h, w, 3]`, or a tensor `[1, h, w]` or `[3, h, w]`, of uint8,
    uint16 or floats in 0..1, or the bytes of a file. One channel more is alpha, and is put on white. A
    `pathlib.Path` is a file: an image, read by Pillow, or by its suffix a video, read by PyAV; a
    `flamingo.media.Segment` is a part of one. However an image comes in, it has the same pixels. `Features`
    stand for a medium that has been encoded.

    In the texts of a list `<image>` is a word like any other, never an image.

    Tokens are laid out as in the paper, `<EOC>` before every image and at the end::

        <BOS> a dog: <EOC> <image> a cat: <EOC> <image> <EOC> <EOS>

    and without `<BOS>` by a tokenizer whose `bos_id` is None.

    An image is resized to fit a square, keeping its proportions, normalised, and padded with zeros: the mean,
    once normalised. With `fit="crop"` its shorter side fits, and the rest is cut off, as in CLIP and
    open_flamingo. With `fit="stretch"` both sides fit, as in SigLIP.

    Args:
        image_size: side of the square, in pixels.
        mean, std: of the three channels in 0..1; those of CLIP by default.
        fit: "pad", "crop" or "stretch".
        resample: "bilinear" or "bicubic"; None for the former with "pad" and the latter else.
        tokenizer: a `ByteTokenizer`, a `PretrainedTokenizer`, or anything with their methods and ids.
        max_media: most media of a document; None for any number. The first are kept, later ones are
            dropped with their `<image>` and the `<EOC>` in front of it, unread; their texts stay. 5 in the
            paper's training.
        fps, max_frames: frames a second of files of videos, and how many of a file are read: in the paper
            1 and 8 in training, 3 and 30 in evaluation.
        max_pixels: of an image or a frame in a file; a larger one is refused before it is decoded. Raise it
            for files that you trust: while it is read, an image takes 12 bytes a pixel and more.

    Raises:
        ValueError: for another fit or resample.

    Source: arXiv 2204.14198, sections 2.3 and 2.4, appendix A.3; the layout is Figure 7's.

    >>> batch = Processor(image_size=32)([["a dog:", torch.zeros(3, 20, 40)], ["nothing to see"]])
    >>> batch.pixels.shape, batch.num_media.tolist()
    (torch.Size([2, 1, 1, 3, 32, 32]), [1, 0])
    """

    def __init__(
        self,
        image_size: int,
        *,
        mean: Sequence[float] = (0.4815, 0.4578, 0.4082),
        std: Sequence[float] = (0.2686, 0.2613, 0.2758),
        fit: Literal["pad", "crop", "stretch"] = "pad",
        resample: Literal["bilinear", "bicubic"] | None = None,
        tokenizer: Tokenizer | None = None,
        max_media: int | None = None,
        fps: float = 1.0,
        max_frames: int = 8,
        max_pixels: int = MAX_PIXELS,
    ):
        if fit not in ("pad", "crop", "stretch"):
            raise ValueError(f"Processor: expected fit 'pad', 'crop' or 'stretch', got {fit!r}.")
        if resample not in (None, "bilinear", "bicubic"):
            raise ValueError(f"Processor: expected resample 'bilinear' or 'bicubic', got {resample!r}.")
        self.image_size = image_size
        self.fit = fit
        self.resample = resample or ("bilinear" if fit == "pad" else "bicubic")
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        self.tokenizer = tokenizer or ByteTokenizer()
        self.max_media = max_media
        self.fps = fps
        self.max_frames = max_frames
        self.max_pixels = max_pixels

    def __call__(
        self,
        documents: Sequence,
        *,
        prompt: bool = False,
        padding_side: Literal["left", "right"] | None = None,
        window: int | None = None,
        p_next: float | Sequence[float] = 0.0,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """
        With probability `p_next` a document's text sees the next image instead of the last one::

            tokens      a  <EOC>  <image>  b  <EOC>  <image>  c
            last        .    .       1     1    1       2     2
            next        1    1       1     2    2       2     2

        Text after the last image has no next one and keeps the last: the paper does not say, and blind text
        teaches the blocks nothing.

        Args:
            documents: list of documents.
            prompt: leave the end open and pad on the left, for `Flamingo.generate`; otherwise a document is
                closed by `<EOC><EOS>` and padded on the right.
            padding_side: "left" or "right" where it is not to follow from `prompt`.
            window: of a document with more tokens than this, take so many in a row from a random place, with
                the media among them, of which `max_media` then keeps the first; 256 in the paper's training.
            p_next: see above, for all documents or for each; 0.5 in the paper's training on web pages.
            generator: of what is random; torch's own by default. For each document in turn it is asked for a
                place, if the document is too long, and for a side, if `p_next` is not 0.

        Raises:
            ValueError: if `<image>` tokens and images do not match, an image has a wrong shape or range, or a
                file cannot be read or is too large.
            FileNotFoundError: if a file does not exist.
            TypeError: if a part of a document is neither text nor an image.
            ImportError: if a file needs Pillow or PyAV and it is not installed.
        """
        if isinstance(documents, str):
            raise TypeError(
                "Processor: expected a list of documents, each a list of texts and images, got str."
            )
        if padding_side not in (None, "left", "right"):
            raise ValueError(f"Processor: expected padding_side 'left' or 'right', got {padding_side!r}.")
        left = prompt if padding_side is None else padding_side == "left"
        chances = [p_next] * len(documents) if isinstance(p_next, (int, float)) else p_next
        if len(chances) != len(documents):
            raise ValueError(
                f"Processor: expected one p_next, or one for each of the {len(documents)} documents, "
                f"got {len(chances)}."
            )
        layouts, starts = [], []
        for index, (document, chance) in enumerate(zip(documents, chances, strict=True)):
            layout = self.lay_out(document, name=f"document {index}", prompt=prompt)
            if window is not None and len(layout.ids) > window:
                layout = self._window(layout, window, generator)
            layout = self.first_media(layout)
            see_next = chance > 0 and torch.rand((), generator=generator).item() < chance
            layouts.append(layout)
            starts.append(self._starts(layout.ids, see_next))
        pixels, num_frames = self.pad_clips([[self.clip(m) for m in layout.media] for layout in layouts])
        return Batch(
            input_ids=pad([layout.ids for layout in layouts], self.tokenizer.pad_id, left=left),
            attention_mask=pad([[1] * len(layout.ids) for layout in layouts], 0, left=left).bool(),
            pixels=pixels,
            num_media=torch.tensor([len(layout.media) for layout in layouts], dtype=torch.int64),
            num_frames=num_frames,
            media_starts=pad(starts, 0, left=left).bool(),
            labels=pad([self._labels(layout.ids) for layout in layouts], -100, left=left),
        )

    def lay_out(
        self,
        document: Any,
        *,
        name: str = "the document",
        prompt: bool = False,
        after: Layout | None = None,
    ) -> Layout:
        """A document's tokens and media.

        Args:
            document: see the class.
            name: what errors call it.
            prompt: as in `__call__`.
            after: a prompt that the document goes on from. The layout is then of what is new, and together
                they are that of one document.
        """
        tokenizer = self.tokenizer
        ids, media = [*(self._beginning if after is None else after.ids)], []
        for part in _interleave(document, name):
            if isinstance(part, str):
                ids += self.encode(part)
            else:
                ids += [*self._end_of_chunk(ids), tokenizer.image_id]
                media.append(part)
        if not prompt:
            ids += [*self._end_of_chunk(ids), tokenizer.eos_id]
        return Layout(ids if after is None else ids[len(after.ids) :], media)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of which is an image: one that is spelled out is taken apart."""
        pieces = re.split(f"(?<={IMAGE[0]})(?={IMAGE[1:]})", text)
        return [id for piece in pieces for id in self.tokenizer.encode(piece)]

    def clip(self, medium: Any) -> Tensor:
        """A medium, read and resized: float32 `[F, 3, image_size, image_size]`; features as they are."""
        if isinstance(medium, Features):
            return medium.tensor
        frames = read_frames(medium, fps=self.fps, max_frames=self.max_frames, max_pixels=self.max_pixels)
        return torch.stack([self._square(frame) for frame in frames])

    def pad_clips(self, clip_lists: list[list[Tensor]]) -> tuple[Tensor, Tensor | None]:
        """The clips of each document to pixels `[B, M, F, 3, image_size, image_size]` and num_frames
        `[B, M]`, which is None where all clips have F frames; features to `[B, M, F, v, dim]`.

        Raises:
            ValueError: if some are features and others are not, or features have several sizes.
        """
        most_media = max(map(len, clip_lists), default=0)
        most_frames = max((len(clip) for clips in clip_lists for clip in clips), default=1)
        shapes = {clip.shape[1:] for clips in clip_lists for clip in clips}
        if len(shapes) > 1:
            raise ValueError(
                f"Processor: expected all media as images, or all as features of one size, got frames of the "
                f"shapes {', '.join(map(str, sorted(map(tuple, shapes))))}."
            )
        shape = shapes.pop() if shapes else (3, self.image_size, self.image_size)
        pixels = torch.zeros(len(clip_lists), most_media, most_frames, *shape)
        num_frames = torch.full((len(clip_lists), most_media), most_frames)
        for row, clips in enumerate(clip_lists):
            for column, clip in enumerate(clips):
                pixels[row, column, : len(clip)] = clip
                num_frames[row, column] = len(clip)
        return pixels, num_frames if (num_frames < most_frames).any() else None

    @property
    def _beginning(self) -> list[int]:
        """`<BOS>`, where the tokenizer has one."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def _end_of_chunk(self, ids: list[int]) -> list[int]:
        """`<EOC>`, unless nothing or an `<EOC>` written by the user is before it."""
        is_first = len(ids) == len(self._beginning)
        return [] if is_first or ids[-1] == self.tokenizer.eoc_id else [self.tokenizer.eoc_id]

    def _window(self, layout: Layout, length: int, generator: torch.Generator | None) -> Layout:
        """So many tokens in a row from a random place, and the media among them."""
        places = len(layout.ids) - length + 1
        start = int(torch.randint(places, (), generator=generator))
        ids = layout.ids[start : start + length]
        first = layout.ids[:start].count(self.tokenizer.image_id)
        return Layout(ids, layout.media[first : first + ids.count(self.tokenizer.image_id)])

    def first_media(self, layout: Layout, *, before: int = 0) -> Layout:
        """The first `max_media` media, those before it counted too, without the `<EOC><image>` of others."""
        most = len(layout.media) if self.max_media is None else max(0, self.max_media - before)
        if len(layout.media) <= most:
            return layout
        tokenizer, ids, found = self.tokenizer, [], 0
        for id in layout.ids:
            found += id == tokenizer.image_id
            if id != tokenizer.image_id or found <= most:
                ids.append(id)
            elif ids and ids[-1] == tokenizer.eoc_id:
                ids.pop()
        return Layout(ids, layout.media[:most])

    def _starts(self, ids: list[int], see_next: bool) -> list[bool]:
        """Where the text of each medium begins: at its `<image>`, or right after that of the one before."""
        images = [place for place, id in enumerate(ids) if id == self.tokenizer.image_id]
        starts = {0, *(place + 1 for place in images[:-1])} if see_next and images else set(images)
        return [place in starts for place in range(len(ids))]

    def _labels(self, ids: list[int]) -> list[int]:
        """The tokens to predict: all but a document's first, which nothing precedes, and `<image>`."""
        return [-100 if not place or id == self.tokenizer.image_id else id for place, id in enumerate(ids)]

    def _square(self, image: Tensor) -> Tensor:
        """An image `[3, h, w]` in 0..1 to a normalised `[3, image_size, image_size]`."""
        size = self.image_size
        if self.fit != "pad":
            image = self._cropped(image) if self.fit == "crop" else self._resized(image, size, size)
            return (image - self.mean) / self.std
        height, width = image.shape[1:]
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        image = self._resized(image, height, width)
        left, top = (size - width) // 2, (size - height) // 2
        image = (image - self.mean) / self.std
        return F.pad(image, (left, size - width - left, top, size - height - top))

    def _cropped(self, image: Tensor) -> Tensor:
        """As torchvision's Resize and CenterCrop do it; of a thin image the middle alone is resized."""
        size = self.image_size
        image = _middle(image)
        height, width = (size * side // min(image.shape[1:]) for side in image.shape[1:])
        image = self._resized(image, height, width)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]

    def _resized(self, image: Tensor, height: int, width: int) -> Tensor:
        image = F.interpolate(image[None], (height, width), mode=self.resample, antialias=True)[0]
        return image.clamp(0, 1)  # cubics overshoot


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    """Rows of integers to int64 `[B, T]`, the shorter ones filled with a value on one side.

    >>> pad([[1, 2, 3], [4]], 0, left=True).tolist()
    [[1, 2, 3], [0, 0, 4]]
    """
    length = max(map(len, rows), default=0)
    fill = [[value] * (length - len(row)) for row in rows]
    padded = [[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)


def _middle(image: Tensor, *, longest: int = 8) -> Tensor:
    """An image without most of what a crop to a square would cut off, both ends alike.

    A line of 16,000 x 1 pixels would be resized to 10 GiB.
    """
    shorter = min(image.shape[1:])
    top, left = (max(0, (side - longest * shorter) // 2) for side in image.shape[1:])
    return image[:, top : image.shape[1] - top, left : image.shape[2] - left]


def _interleave(document: Any, name: str) -> list:
    """Either form of a document to one list of texts and media."""
    if isinstance(document, tuple):
        if [type(part) for part in document] != [str, list]:
            raise TypeError(
                f"Processor: expected {name} to be a list, or a tuple (text, list of images), got a tuple of "
                f"{', '.join(type(part).__name__ for part in document)}."
            )
        text, media = document
        chunks = text.split(IMAGE)
        if len(chunks) - 1 != len(media):
            raise ValueError(
                f"Processor: expected one image for each <image> of {name}, got {len(media)} images and "
                f"{len(chunks) - 1} <image> tokens."
            )
        if any(isinstance(medium, str) for medium in media):
            raise TypeError(f"Processor: expected only images in the second half of {name}, got a text.")
        parts: list = [chunks[0]]
        for medium, chunk in zip(media, chunks[1:], strict=True):
            parts += [medium, chunk]
        return parts
    if not isinstance(document, list):
        raise TypeError(
            f"Processor: expected {name} to be a list of texts and images, got {type(document).__name__}."
        )
    return list(document)
