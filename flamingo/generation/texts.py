"""What follows a prompt, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from flamingo.generation.latents import Latents
from flamingo.generation.prompts import Prompt, encode, lay_out, reading, together
from flamingo.generation.tokens import stream
from flamingo.processor import Processor


def complete(
    model: Any,
    processor: Processor,
    documents: Sequence[Any],
    *,
    after: Prompt | None = None,
    latents: Latents | None = None,
    **options: Any,
) -> list[str]:
    """The text that follows each document, up to the `<EOC>` or `<EOS>` that ends it.

    Args:
        model: a Flamingo in eval mode.
        processor: of the model.
        documents: as `Processor` takes them and `flamingo.fewshot` makes them: a caption is what follows
            `[image, "Output:"]`, an answer what follows `[image, "Question: what is it? Answer:"]`.
        after: a prompt of `read_prompt` that comes before each of them.
        latents: of media that may be encoded already; by default each is encoded once a call.
        options: of `generate`; `max_new_tokens` is 32 by default.

    Raises:
        ValueError: as `Processor` and `generate`.

    Determinism: see `generate`.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> len(complete(model, processor, [[torch.zeros(3, 8, 8), "Output:"], ["Output:"]], max_new_tokens=2))
    2
    """
    latents = Latents(model, processor) if latents is None else latents
    layouts, texts = lay_out(processor, documents, after), [""] * len(documents)
    ends = (processor.tokenizer.eoc_id, processor.tokenizer.eos_id)
    for places in together(layouts, max(1, len(layouts)), after):
        prompts = encode([layouts[place] for place in places], processor, latents, after)
        with reading(model, len(places), after) as context:
            ids = model.generate(
                prompts.input_ids,
                None,
                prompts.attention_mask,
                media=prompts.media,
                context=context,
                stop_token_ids=ends,
                **options,
            )
        for place, row in zip(places, ids.tolist(), strict=True):
            texts[place] = processor.tokenizer.decode(takewhile(lambda id: id not in ends, row))
    return texts


def stream_text(
    model: Any,
    processor: Processor,
    document: Any,
    *,
    after: Prompt | None = None,
    latents: Latents | None = None,
    **options: Any,
) -> Iterator[str]:
    """The text that `complete` returns for one document, in pieces, each as soon as it is known.

    Args:
        See `complete`; the options are those of `stream`.

    Yields:
        pieces of text of one character or more.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> document, options = [torch.zeros(3, 8, 8), "Output:"], {"max_new_tokens": 8}
    >>> "".join(stream_text(model, processor, document, **options)) == complete(
    ...     model, processor, [document], **options
    ... )[0]
    True
    """
    latents = Latents(model, processor) if latents is None else latents
    layouts = lay_out(processor, [document], after)
    prompts = encode(layouts, processor, latents, after)
    ends = (processor.tokenizer.eoc_id, processor.tokenizer.eos_id)
    ids: list[int] = []
    said = ""
    with reading(model, 1, after) as context:
        tokens = stream(
            model,
            prompts.input_ids,
            None,
            prompts.attention_mask,
            media=prompts.media,
            context=context,
            stop_token_ids=ends,
            **options,
        )
        for token in tokens:
            if int(token) not in ends:
                ids.append(int(token))
            text = processor.tokenizer.decode(ids)
            # A character may take several tokens; its beginning is shown as a replacement.
            whole = text if int(token) in ends else text.rstrip("\N{REPLACEMENT CHARACTER}")
            if len(whole) > len(said) and whole.startswith(said):
                yield whole[len(said) :]
                said = whole
    text = processor.tokenizer.decode(ids)
    if len(text) > len(said):
        yield text[len(said) :]
