"""What a Flamingo has read, so that more text and images can follow without reading it again."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from flamingo.config import FlamingoConfig
from flamingo.language import LanguageModel, PretrainedLanguage
from flamingo.modules import PerceiverResampler


class Model(Protocol):
    """What reading and generation ask of a model. `Flamingo` says what each part is."""

    config: FlamingoConfig
    resampler: PerceiverResampler
    language: LanguageModel | PretrainedLanguage

    def encode_media(self, pixels: Tensor, num_frames: Tensor | None = None) -> Tensor: ...

    def decode(
        self,
        input_ids: Tensor,
        media: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
        media_locations: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor: ...


class Context:
    """Documents that a model has read: keys and values of their text, and their media, encoded once.

    ::

        turn 1   <BOS> <image> a dog: ...            read(ids, pixels)    every medium is encoded,
        turn 2   ... woof <EOC> <image> a cat: ...   read(ids, pixels)    every token read, once

    A token costs the same however many images came before it, in a model whose text sees the last one only.

    Args:
        model: a `Flamingo`, or another `Model`; best in eval mode.

    Attributes:
        attention_mask: bool `[B, K]` of the K tokens read so far, False at padding.
        media: `[B, M, R, D_v]`, in every document first those it has seen, in order.
        num_seen: int64 `[B]`, how many media each document has seen.

    Determinism: results do not depend on how a document is cut into turns, up to rounding.

    >>> model = Flamingo(FlamingoConfig.preset("tiny"))
    >>> context = Context(model)
    >>> context.read(torch.tensor([[256, 65]]), torch.zeros(1, 1, 1, 3, 32, 32)).shape
    torch.Size([1, 261])
    >>> context.read(torch.tensor([[66, 256]]), torch.ones(1, 1, 1, 3, 32, 32)).shape
    torch.Size([1, 261])
    """

    attention_mask: Tensor
    media: Tensor
    num_seen: Tensor

    def __init__(self, model: Model):
        self.model = model
        self.cache = model.language.new_cache()
        self._unread: list[tuple[Tensor, Tensor]] = []  # tokens [N, n] that were added, and their mask
        self._padded = False
        self._visible: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """The number K of tokens read, with padding."""
        return self.cache.get_seq_length()

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        *,
        media: Tensor | None = None,
    ) -> Tensor:
        """Reads what was added, and then more text and images.

        Args:
            input_ids, pixels, attention_mask, num_frames: as in `Flamingo.forward`, of the new text alone,
                padded on the left; pixels None for no images.
            media: `[B, M, R, D_v]`, what `Flamingo.encode_media` made of the images, instead of pixels.

        Returns:
            logits `[B, vocab_size]` of the token that follows, -inf for `<image>`, which no model is to say.

        Raises:
            ValueError: if there is another number of documents than before, a document ends in padding or has
                more `<image>` tokens than media.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        waiting, padded = [*self._unread], self._padded
        try:
            self.add(input_ids, mask != 0)
            input_ids, mask = self._take_unread()
            is_image = (input_ids == self.model.config.media_token_id) & mask  # [B, T]
            media = self._encode(input_ids, pixels, num_frames) if media is None else media
            self._check(mask, is_image, media)
        except Exception:
            self._unread, self._padded = waiting, padded  # what was added before can still be read
            raise
        if self.length == 0:
            self.media, self.num_seen, self.attention_mask = media, is_image.sum(dim=1), mask
            self._padded = not bool(mask.all())
            return self._logits(input_ids, media)[:, -1]
        self._add_media(media)
        # Text between images sees one medium throughout, so it can be read as text that follows it.
        starts = is_image.any(dim=0).nonzero().flatten().tolist()
        for start, stop in pairwise(sorted({0, *starts, input_ids.shape[1]})):
            self.num_seen = self.num_seen + is_image[:, start]
            self._visible = None
            logits = self._read_on(input_ids[:, start:stop], mask[:, start:stop])
        return logits[:, -1]

    def add(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Appends tokens `[N, n]`, real where mask `[N, n]` is True, to be read with what comes next.

        N is B, or a multiple of it after `reorder`.
        """
        self._unread.append((tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask))
        self._padded = self._padded or (mask is not None and not bool(mask.all()))

    def forget_unread(self) -> None:
        """Forgets what was added and not read."""
        self._unread, self._visible = [], None
        self._padded = not bool(self.attention_mask.all())

    @torch.no_grad()
    def step(self) -> Tensor:
        """Reads what was added, tokens without images, to logits `[N, vocab_size]` of what follows."""
        return self._read_on(*self._take_unread())[:, -1]

    @torch.no_grad()
    def peek(self, tokens: Tensor) -> Tensor:
        """Reads tokens `[N, n]` without images, to logits `[N, n, vocab_size]` of what follows each, and
        forgets them again, so that several continuations can be compared."""
        length = self.length
        logits = self._read_on(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=tokens.shape[1])
        self.crop(length)
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Goes on with the texts in rows `[N]`: N / B of each document, one after the other."""
        self.cache.reorder_cache(rows)
        self.attention_mask = self.attention_mask[rows]

    def crop(self, length: int) -> None:
        """Forgets the text after its first tokens; media stay."""
        if length < self.length:
            self.cache.crop(length - self.length)
            self.attention_mask = self.attention_mask[:, :length]

    @torch.no_grad()
    def copies(self, count: int) -> Context:
        """A context of so many documents that all begin as the only one of this does, which stays as it is.

        Raises:
            ValueError: if there are several documents, or tokens are still to be read.
        """
        if len(self.attention_mask) != 1 or self._unread:
            raise ValueError(
                f"Context: expected one document that was read, got {len(self.attention_mask)} and "
                f"{len(self._unread)} additions to read. Read one document, and copy its context then."
            )
        other = copy.copy(self)
        other.cache, other._unread, other._visible = copy.deepcopy(self.cache), [], None
        other.cache.batch_repeat_interleave(count)
        other.attention_mask = self.attention_mask.expand(count, -1)
        # Of media that no later text sees, nothing is kept.
        seen = int(self.num_seen)
        first = max(0, seen - 1) if self.model.config.only_attend_immediate_media else 0
        other.media = self.media[:, first:seen].expand(count, -1, -1, -1)
        other.num_seen = self.num_seen.new_full((count,), seen - first)
        return other

    def _take_unread(self) -> tuple[Tensor, Tensor]:
        tokens, masks = zip(*self._unread, strict=True)
        if len({len(each) for each in tokens}) > 1:
            raise ValueError(
                f"Context: expected {len(tokens[0])} documents as before, got {len(tokens[-1])}. Other "
                "documents need a Context of their own."
            )
        self._unread = []
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1)

    def _check(self, mask: Tensor, is_image: Tensor, media: Tensor) -> None:
        if self.length and len(mask) != len(self.attention_mask):
            raise ValueError(
                f"Context: expected {len(self.attention_mask)} documents as before, got {len(mask)}. Other "
                "documents need a Context of their own."
            )
        if mask.shape[1] == 0 or not mask[:, -1].all():
            raise ValueError(
                "Context: expected every document to end in a token, got one that is empty or padded on the "
                "right. Processor(...)(documents, prompt=True) pads on the left."
            )
        most = int(is_image.sum(dim=1).max()) if len(mask) else 0
        if most > media.shape[1]:
            raise ValueError(
                f"Context: expected a medium for every <image> token, got {most} tokens in a document and "
                f"{media.shape[1]} media. Pass their pixels together with the tokens."
            )

    def _encode(self, input_ids: Tensor, pixels: Tensor | None, num_frames: Tensor | None) -> Tensor:
        if pixels is not None:
            return self.model.encode_media(pixels, num_frames)
        latents = self.model.resampler.latents.detach()  # [R, D_v]
        return latents.new_zeros(len(input_ids), 0, *latents.shape, device=input_ids.device)

    def _add_media(self, media: Tensor) -> None:
        """Puts media `[B, M, R, D_v]` behind those that each document has seen, over its padding."""
        every = torch.cat((self.media, media), dim=1)
        slots = torch.arange(int(self.num_seen.max()) + media.shape[1], device=media.device)
        after = slots - self.num_seen[:, None]  # [B, slots]
        last = every.shape[1] - 1
        index = torch.where(after < 0, slots, (self.media.shape[1] + after).clamp(max=last))
        self.media = every.take_along_dim(index[..., None, None], dim=1)

    def _read_on(self, input_ids: Tensor, mask: Tensor, keep: int = 1) -> Tensor:
        """Reads tokens `[N, T]` that all see what was seen last, to logits of the last `keep`."""
        self.attention_mask = torch.cat((self.attention_mask, mask), dim=1)
        return self._logits(input_ids, *self._seen_now(), keep=keep)

    def _logits(
        self, input_ids: Tensor, media: Tensor, locations: Tensor | None = None, *, keep: int = 1
    ) -> Tensor:
        """Reads tokens `[N, T]` to logits `[N, keep, V]` of what follows the last ones."""
        logits = self.model.decode(
            input_ids,
            media,
            self._mask,
            cache=self.cache,
            media_locations=locations,
            logits_to_keep=keep,
        )
        image = torch.tensor([self.model.config.media_token_id], device=logits.device)
        return logits.index_fill(-1, image, -torch.inf)

    def _seen_now(self) -> tuple[Tensor, Tensor]:
        """The media that further text sees, and bool `[B, M]`, True for each that is there.

        They are the same tensors until another image comes, so a block can keep what it makes of them.
        """
        if self._visible is None:
            if self.model.config.only_attend_immediate_media and self.media.shape[1]:
                last = (self.num_seen - 1).clamp(min=0)
                media = self.media.take_along_dim(last[:, None, None, None], dim=1)
                self._visible = media, self.num_seen[:, None] > 0
            else:
                slots = torch.arange(self.media.shape[1], device=self.media.device)
                self._visible = self.media, slots < self.num_seen[:, None]
        return self._visible

    @property
    def _mask(self) -> Tensor | None:
        """None where nothing is padded: language models are faster without a mask."""
        return self.attention_mask if self._padded else None
