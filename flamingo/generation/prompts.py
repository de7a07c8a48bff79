"""Prompts, as what a model reads: tokens and latents. One can be read once, for many others to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor

from flamingo.generation.context import Context
from flamingo.generation.latents import Latents
from flamingo.processor import Layout, Processor, pad


class EncodedPrompts(NamedTuple):
    """Prompts whose media are latents already."""

    input_ids: Tensor  # int64 [P, T], padded on the left
    attention_mask: Tensor  # bool [P, T]
    media: Tensor  # [P, M, R, D_v]


class Prompt:
    """A document that a model has read, for any number of others to go on from; `read_prompt` makes it.

    ::

        <BOS> <image> Output: a cat. <EOC> <image> Output: two dogs. <EOC>     read once
                                                     <image> Output:           and many of these
                                                     <image> Output:

    Attributes:
        layout: its tokens and media.
        keeps_memory: whether that of one batch is held for the next. Of many prompts it would be much.
    """

    keeps_memory = True

    def __init__(self, layout: Layout, context: Context):
        self.layout = layout
        self._read = context
        self._idle: list[tuple[int, Context]] = []  # copies that are not in use, and of how many documents

    @contextmanager
    def followed(self, count: int) -> Iterator[Context]:
        """A context of so many documents that begin with the prompt, to read what follows in each.

        The next one of as many documents is the same again, without what was read: its memory is not copied.
        """
        context = self._take(count)
        length, before = context.length, (context.attention_mask, context.media, context.num_seen)
        yield context
        if self.keeps_memory and len(context.attention_mask) == count:
            context.crop(length)
            context.forget_unread()
            context.attention_mask, context.media, context.num_seen = before
            self._idle = [(count, context)]  # one: they are large

    def _take(self, count: int) -> Context:
        with suppress(IndexError):  # another thread may have taken the last
            while True:
                size, context = self._idle.pop()
                if size == count:
                    return context
        return self._read.copies(count)


def read_prompt(model: Any, processor: Processor, document: Any, *, latents: Latents | None = None) -> Prompt:
    """Reads a document once: `complete` and `log_likelihoods` go on from it, as `after`.

    What they return is what they would return for the two documents in one.

    Args:
        model: a Flamingo in eval mode.
        processor: of the model.
        document: as `Processor` takes it, as a list that ends where others are to begin.
        latents: of media that may be encoded already.

    Raises:
        ValueError: as `Processor`.

    Limits: keys and values of all its tokens are held for every document that goes on from it at once.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> shots = read_prompt(model, processor, [torch.zeros(3, 8, 8), "Output: black.<EOC>"])
    >>> queries = [[torch.ones(3, 8, 8), "Output:"], [torch.rand(3, 8, 8), "Output:"]]
    >>> len(complete(model, processor, queries, after=shots, max_new_tokens=2))
    2
    """
    latents = Latents(model, processor) if latents is None else latents
    layout = processor.first_media(processor.lay_out(document, prompt=True))
    context = Context(model)
    if layout.ids:
        encoded = encode([layout], processor, latents)
        context.read(encoded.input_ids, None, media=encoded.media)
    return Prompt(layout, context)


def lay_out(processor: Processor, documents: Sequence[Any], after: Prompt | None = None) -> list[Layout]:
    """The tokens and media of prompts, behind those of another."""
    before = None if after is None else after.layout
    return [
        processor.first_media(
            processor.lay_out(document, name=f"document {index}", prompt=True, after=before),
            before=0 if before is None else len(before.media),
        )
        for index, document in enumerate(documents)
    ]


def encode(
    layouts: Sequence[Layout], processor: Processor, latents: Latents, after: Prompt | None = None
) -> EncodedPrompts:
    """The tensors of prompts, behind another."""
    before = 0 if after is None else len(after.layout.media)
    media = latents.of_documents([layout.media for layout in layouts], first=before)
    return EncodedPrompts(
        pad([layout.ids for layout in layouts], processor.tokenizer.pad_id, left=True).to(media.device),
        pad([[1] * len(layout.ids) for layout in layouts], 0, left=True).bool().to(media.device),
        media,
    )


def together(layouts: Sequence[Layout], size: int, after: Prompt | None = None) -> list[list[int]]:
    """Which prompts are read at once, so many at most.

    Behind another prompt those of one length are: padding in the middle of a text would put its ends further
    apart in models that count it, as MPT does.
    """
    if after is None:
        groups = [list(range(len(layouts)))]
    else:
        by_length: dict[int, list[int]] = {}
        for place, layout in enumerate(layouts):
            by_length.setdefault(len(layout.ids), []).append(place)
        groups = list(by_length.values())
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


@contextmanager
def reading(model: Any, count: int, after: Prompt | None) -> Iterator[Context]:
    """A context for so many documents, from the beginning or behind a prompt."""
    if after is None or not after.layout.ids:
        yield Context(model)
    else:
        with after.followed(count) as context:
            yield context
