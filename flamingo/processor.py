"""Documents of interleaved text and images to the tensors a Flamingo takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.tokenizer import ByteTokenizer


class Batch(NamedTuple):
    """Documents padded to one length and one number of media."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # bool [B, T], False at padding
    pixels: Tensor  # float32 [B, M, F, 3, image_size, image_size]
    num_media: Tensor  # int64 [B], the rest of M is padding
    num_frames: Tensor | None  # int64 [B, M] where clips differ in length, else None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.pixels.to(device),
            self.num_media.to(device),
            None if self.num_frames is None else self.num_frames.to(device),
        )


class Processor:
    """Turns documents into a `Batch`.

    A document is a list of texts and media in reading order, or a tuple `(text, list of media)` whose text
    has one `<image>` for every medium. A medium is an image, or a list of images: the frames of a clip. An
    image is a PIL image, an array `[h, w]` or `[h, w, 3]`, or a tensor `[1, h, w]` or `[3, h, w]`, of uint8
    or of floats in 0..1.

    Tokens are laid out as in the paper, `<EOC>` before every image and at the end::

        <BOS> a dog: <EOC> <image> a cat: <EOC> <image> <EOC> <EOS>

    An image is resized to fit a square, keeping its proportions, normalised, and padded with zeros: the mean,
    once normalised.

    Args:
        image_size: side of the square, in pixels.
        mean, std: of the three channels in 0..1; those of CLIP by default.
        tokenizer: anything with the methods and ids of `ByteTokenizer`.

    Source: arXiv 2204.14198, sections 2.3 and 2.4; the layout is Figure 7's.

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
        tokenizer: ByteTokenizer | None = None,
    ):
        self.image_size = image_size
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        self.tokenizer = tokenizer or ByteTokenizer()

    def __call__(self, documents: Sequence, *, prompt: bool = False) -> Batch:
        """
        Args:
            documents: list of documents.
            prompt: leave the end open and pad on the left, for `Flamingo.generate`; otherwise a document is
                closed by `<EOC><EOS>` and padded on the right.

        Raises:
            ValueError: if `<image>` tokens and images do not match, or an image has a wrong shape or range.
            TypeError: if a part of a document is neither text nor an image.
        """
        if isinstance(documents, str):
            raise TypeError(
                "Processor: expected a list of documents, each a list of texts and images, got str."
            )
        token_lists, clip_lists = [], []
        for index, document in enumerate(documents):
            parts = _interleave(document, f"document {index}")
            token_lists.append(self._tokens(parts, prompt))
            clip_lists.append([self._clip(part) for part in parts if not isinstance(part, str)])
        input_ids, attention_mask = self._pad_tokens(token_lists, left=prompt)
        pixels, num_frames = self._pad_clips(clip_lists)
        num_media = torch.tensor([len(clips) for clips in clip_lists], dtype=torch.int64)
        return Batch(input_ids, attention_mask, pixels, num_media, num_frames)

    def _tokens(self, parts: list, prompt: bool) -> list[int]:
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_id]
        for part in parts:
            if isinstance(part, str):
                ids += tokenizer.encode(part)
            else:
                ids += [*self._end_of_chunk(ids), tokenizer.image_id]
        return ids if prompt else [*ids, *self._end_of_chunk(ids), tokenizer.eos_id]

    def _end_of_chunk(self, ids: list[int]) -> list[int]:
        """`<EOC>`, unless nothing or an `<EOC>` written by the user is before it."""
        return [] if ids[-1] in (self.tokenizer.bos_id, self.tokenizer.eoc_id) else [self.tokenizer.eoc_id]

    def _clip(self, medium: Any) -> Tensor:
        """A medium to `[F, 3, image_size, image_size]`."""
        frames = medium if _is_clip(medium) else [medium]
        if len(frames) == 0:
            raise ValueError("Processor: expected a clip of one frame or more, got an empty list.")
        return torch.stack([self._square(_to_image(frame)) for frame in frames])

    def _square(self, image: Tensor) -> Tensor:
        """An image `[3, h, w]` in 0..1 to a normalised `[3, image_size, image_size]`."""
        size = self.image_size
        height, width = image.shape[1:]
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        left, top = (size - width) // 2, (size - height) // 2
        image = (image - self.mean) / self.std
        return F.pad(image, (left, size - width - left, top, size - height - top))

    def _pad_tokens(self, token_lists: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        length = max(map(len, token_lists), default=0)
        input_ids = torch.full((len(token_lists), length), self.tokenizer.pad_id)
        attention_mask = torch.zeros(len(token_lists), length, dtype=torch.bool)
        for row, tokens in enumerate(token_lists):
            place = slice(length - len(tokens), length) if left else slice(0, len(tokens))
            input_ids[row, place] = torch.tensor(tokens)
            attention_mask[row, place] = True
        return input_ids, attention_mask

    def _pad_clips(self, clip_lists: list[list[Tensor]]) -> tuple[Tensor, Tensor | None]:
        most_media = max(map(len, clip_lists), default=0)
        most_frames = max((len(clip) for clips in clip_lists for clip in clips), default=1)
        size = self.image_size
        pixels = torch.zeros(len(clip_lists), most_media, most_frames, 3, size, size)
        num_frames = torch.full((len(clip_lists), most_media), most_frames)
        for row, clips in enumerate(clip_lists):
            for column, clip in enumerate(clips):
                pixels[row, column, : len(clip)] = clip
                num_frames[row, column] = len(clip)
        return pixels, num_frames if (num_frames < most_frames).any() else None


def _interleave(document: Any, name: str) -> list:
    """Either form of a document to one list of texts and media."""
    if isinstance(document, tuple):
        if [type(part) for part in document] != [str, list]:
            raise TypeError(
                f"Processor: expected {name} to be a list, or a tuple (text, list of images), got a tuple of "
                f"{', '.join(type(part).__name__ for part in document)}."
            )
        text, media = document
        chunks = text.split("<image>")
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
    if any(isinstance(part, str) and "<image>" in part for part in document):
        raise ValueError(
            f"Processor: expected no <image> in the texts of {name}, got one without an image. Put the image "
            "itself in that place, or pass a tuple (text, list of images)."
        )
    return list(document)


def _is_clip(medium: Any) -> bool:
    if isinstance(medium, (np.ndarray, Tensor)):
        return medium.ndim == 4
    return isinstance(medium, (list, tuple))


def _to_image(image: Any) -> Tensor:
    """A PIL image, an array or a tensor to float32 `[3, h, w]` in 0..1."""
    if hasattr(image, "convert"):  # PIL, without importing it
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, order="C"))
        image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"Processor: expected a text, a PIL image, an array, a tensor or a list of these, got "
            f"{type(image).__name__}."
        )
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            "Processor: expected an image array (h, w) or (h, w, 3), or a tensor (1, h, w) or (3, h, w), got "
            f"{tuple(image.shape)} (channels first)."
        )
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point():
        raise TypeError(f"Processor: expected an image of uint8 or a floating type, got {image.dtype}.")
    elif not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"Processor: expected a floating image in 0..1, got {image.min():.4g}..{image.max():.4g}. "
            "Divide by 255, or pass uint8."
        )
    return image.detach().cpu().float().expand(3, -1, -1)
