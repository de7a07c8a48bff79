"""The tokens that follow a prompt: greedy, sampled or by beam search, all at once or one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor

from flamingo.generation.beams import beam_search
from flamingo.generation.context import Context, Model


def generate(
    model: Model,
    input_ids: Tensor,
    pixels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_frames: Tensor | None = None,
    *,
    media: Tensor | None = None,
    max_new_tokens: int = 32,
    stop_token_ids: Collection[int] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    context: Context | None = None,
) -> Tensor:
    """What follows the documents: the likeliest tokens one by one, or sampled, or the likeliest text found.

    Media are encoded once, and every token is read once. `<image>` is never emitted.

    Args:
        model: a `Flamingo`, or another `Model` of `flamingo.generation`; best in eval mode.
        input_ids, pixels, attention_mask, num_frames: as in `Flamingo.forward`, padded on the left; pixels
            None for no images.
        media: `[B, M, R, D_v]`, what `Flamingo.encode_media` made of the images, instead of pixels.
        max_new_tokens: tokens to add at most, 1 or more.
        stop_token_ids: a document ends with one of these, as `<EOC>` and `<EOS>`.
        num_beams: width of a beam search (paper: 3); 1 for none.
        length_penalty: a text found by beam search is worth its log-likelihood over its length to this power.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that have this probability together.
        generator: of the random numbers, on the device of the logits.
        context: where an earlier turn was read; the documents follow it, and are read into it.

    Returns:
        int64 `[B, n]`, the new tokens, n <= max_new_tokens. A document that has ended repeats its last token.

    Raises:
        ValueError: if a document ends in padding or has more `<image>` tokens than media, or options are out
            of range or exclude each other.

    Determinism: without sampling, as the model is; with it, as generator is.

    Source: arXiv 2204.14198, section 3 and appendix C: beam search of width 3, greedy in dialogue.

    >>> model = Flamingo(FlamingoConfig.preset("tiny"))
    >>> context, pixels = Context(model), torch.zeros(1, 1, 1, 3, 32, 32)
    >>> ids = torch.tensor([[256, 65]])
    >>> generate(model, ids, pixels, max_new_tokens=3, num_beams=3, context=context).shape
    torch.Size([1, 3])
    >>> generate(model, ids, pixels, max_new_tokens=3, context=context).shape  # another image, another turn
    torch.Size([1, 3])
    """
    _check(max_new_tokens, temperature, top_k, top_p, num_beams)
    context = Context(model) if context is None else context
    logits = context.read(input_ids, pixels, attention_mask, num_frames, media=media)
    if num_beams == 1:
        pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return torch.stack(list(_one_by_one(context, logits, pick, max_new_tokens, stop_token_ids)), dim=1)
    return beam_search(
        context,
        logits,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        length_penalty=length_penalty,
    )


def stream(
    model: Model,
    input_ids: Tensor,
    pixels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_frames: Tensor | None = None,
    *,
    media: Tensor | None = None,
    max_new_tokens: int = 32,
    stop_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    context: Context | None = None,
) -> Iterator[Tensor]:
    """The tokens that `generate` returns, each as soon as it is known.

    Args:
        See `generate`.

    Yields:
        int64 `[B]`, the next token of every document, until all have ended.

    Raises:
        ValueError: see `generate`.

    >>> model = Flamingo(FlamingoConfig.preset("tiny"))
    >>> [token.shape for token in stream(model, torch.tensor([[65, 66]]), max_new_tokens=2)]
    [torch.Size([1]), torch.Size([1])]
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    context = Context(model) if context is None else context
    logits = context.read(input_ids, pixels, attention_mask, num_frames, media=media)
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    yield from _one_by_one(context, logits, pick, max_new_tokens, stop_token_ids)


@torch.no_grad()
def _one_by_one(
    context: Context,
    logits: Tensor,
    pick: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Iterator[Tensor]:
    """The tokens `[B]` that follow what was read, the first picked from logits `[B, V]`."""
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=logits.device)
    token = pick(logits)
    context.add(token[:, None])
    yield token
    ended = torch.isin(token, stops)
    for _ in range(max_new_tokens - 1):
        num_ended = int(ended.sum())
        if num_ended == len(ended):
            return
        new = pick(context.step())
        token = torch.where(ended, token, new)
        # What a document repeats after its end is padding to a later turn.
        context.add(token[:, None], ~ended[:, None] if num_ended else None)
        yield token
        ended = ended | torch.isin(token, stops)


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits `[B, V]`: int64 `[B]`. The options are those of `generate`.

    >>> choose(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
    [1]
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    if top_p is not None:
        p = logits.softmax(dim=-1)
        enough = p.cumsum(dim=-1) - p >= top_p  # what is likelier has the probability already
        logits = logits.masked_fill(enough, -torch.inf)
    place = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, place)[:, 0]


def _check(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_beams: int = 1,
) -> None:
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("num_beams", num_beams, num_beams >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1, or None"),
    ):
        if not fits:
            raise ValueError(f"generate: expected {name} to be {expected}, got {value}.")
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            f"generate: expected a temperature above 0 with top_k or top_p, which draw tokens, got "
            f"temperature=0 with {top_k=}, {top_p=}."
        )
    if temperature > 0 and num_beams > 1:
        raise ValueError(
            f"generate: expected beam search or sampling, got {num_beams=} and {temperature=}. Leave one out."
        )
