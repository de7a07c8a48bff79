"""Closed-ended tasks: each candidate is appended to the prompt and ranked by its log-likelihood."""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flamingo.context import Context
from flamingo.fewshot.prompts import Sample, Template
from flamingo.processor import Layout, Processor, pad

T = TypeVar("T")


class EncodedPrompts(NamedTuple):
    """Prompts whose media are latents already."""

    input_ids: Tensor  # int64 [P, T], padded on the left
    attention_mask: Tensor  # bool [P, T]
    media: Tensor  # [P, M, R, D_v]


@torch.no_grad()
def log_likelihoods(
    model: Any,
    processor: Processor,
    documents: Sequence,
    candidates: Sequence[str],
    *,
    closed: bool = True,
    batch_size: int = 8,
) -> Tensor:
    """How likely each candidate is after each prompt.

    ::

        score[p, c] = sum over the tokens t of candidate c of log P(t | prompt p, the tokens before t)

    P leaves out `<image>`, as in generation. Every medium is encoded once, for all candidates and for all
    prompts that hold the same object or path, and every prompt is read once.

    Args:
        model: a Flamingo in eval mode.
        processor: of the model.
        documents: P prompts, as `Template.prompt` makes them.
        candidates: C texts; a space is put in front of each.
        closed: count the `<EOC>` after a candidate too, so that "cat" is not every "cathedral". The paper
            does not say.
        batch_size: how many pairs of prompt and candidate, or media, the model is given at once.

    Returns:
        float32 `[P, C]`.

    Raises:
        ValueError: without candidates, or if the resampler tells a document's first medium from its second
            (`max_num_media`), so that one encoding cannot serve two places.

    Source: arXiv 2204.14198, appendix B.1.4.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> scores = log_likelihoods(model, processor, [[torch.zeros(3, 8, 8), "Output:"]], ["a cat", "a dog"])
    >>> scores.shape
    torch.Size([1, 2])
    """
    if not candidates:
        raise ValueError("log_likelihoods: expected one candidate or more, got none.")
    tokenizer = processor.tokenizer
    end = [tokenizer.eoc_id] if closed else []
    answers = [[*tokenizer.encode(f" {candidate}"), *end] for candidate in candidates]
    prompts = encode_prompts(model, processor, documents, batch_size=batch_size)
    if not documents:
        return torch.zeros(0, len(answers))
    parts = zip(*(each.split(batch_size) for each in prompts), strict=True)
    return torch.cat([_score(model, EncodedPrompts(*part), answers, batch_size) for part in parts])


def _score(model: Any, prompts: EncodedPrompts, answers: list[list[int]], batch_size: int) -> Tensor:
    """Prompts that are read at once, to `[P, C]`."""
    context, count = Context(model), len(prompts.input_ids)
    after_prompt = context.read(prompts.input_ids, None, prompts.attention_mask, media=prompts.media)
    first_log_p = after_prompt.float().log_softmax(dim=-1)  # [P, V]
    device = first_log_p.device
    at_once = min(len(answers), max(1, batch_size // count))
    context.reorder(torch.arange(count, device=device).repeat_interleave(at_once))
    scores = []
    for some in batches(answers, at_once):
        some = [*some, *[some[0]] * (at_once - len(some))]  # as many texts every time
        tokens = pad(some, 0, left=False).to(device)  # [A, L]
        is_token = pad([[1] * len(answer) for answer in some], 0, left=False).bool().to(device)
        log_p = first_log_p[:, tokens[:, 0], None]  # [P, A, 1]
        if tokens.shape[1] > 1:
            every = tokens.repeat(count, 1)
            follows = context.peek(every[:, :-1]).float().log_softmax(dim=-1)
            log_p = torch.cat((log_p, follows.gather(-1, every[:, 1:, None]).view(count, at_once, -1)), -1)
        scores.append(log_p.masked_fill(~is_token, 0.0).sum(dim=-1).cpu())
    return torch.cat(scores, dim=1)[:, : len(answers)]


def ensemble_log_likelihoods(
    model: Any,
    processor: Processor,
    template: Template,
    query: Sample,
    shots: Sequence[Sample],
    candidates: Sequence[str],
    *,
    permutations: int = 6,
    generator: torch.Generator | None = None,
    batch_size: int = 8,
) -> Tensor:
    """The mean of `log_likelihoods` over random orders of the shots, float32 `[C]`.

    Args:
        model, processor, candidates, batch_size: see `log_likelihoods`.
        template, query, shots: of the prompt.
        permutations: number of orders; 6 in the paper.
        generator: of the orders; torch's own by default.

    Source: arXiv 2204.14198, appendix B.1.4.
    """
    orders = [torch.randperm(len(shots), generator=generator).tolist() for _ in range(permutations)]
    documents = [template.prompt(query, [shots[place] for place in order]) for order in orders]
    return log_likelihoods(model, processor, documents, candidates, batch_size=batch_size).mean(dim=0)


@torch.no_grad()
def encode_prompts(
    model: Any, processor: Processor, documents: Sequence, *, batch_size: int = 8
) -> EncodedPrompts:
    """Prompts to tokens and latents, each distinct medium encoded once; see `log_likelihoods`."""
    if getattr(getattr(model, "config", None), "max_num_media", None):
        raise ValueError(
            f"encode_prompts: expected a model without media embeddings, got max_num_media="
            f"{model.config.max_num_media}: a medium would need another encoding in every place."
        )
    device = next(model.parameters()).device
    layouts = [
        processor.lay_out(document, name=f"document {index}", prompt=True)
        for index, document in enumerate(documents)
    ]
    distinct = {identity(medium): medium for layout in layouts for medium in layout.media}
    return EncodedPrompts(
        pad([layout.ids for layout in layouts], processor.tokenizer.pad_id, left=True).to(device),
        pad([[1] * len(layout.ids) for layout in layouts], 0, left=True).bool().to(device),
        _spread(_encode(model, processor, list(distinct.values()), batch_size), list(distinct), layouts),
    )


def _encode(model: Any, processor: Processor, media: list, batch_size: int) -> Tensor:
    """Media to latents `[N, R, D_v]`."""
    device = next(model.parameters()).device
    latents = []
    for some in list(batches(media, batch_size)) or [[]]:
        pixels, num_frames = processor.pad_clips([[processor.clip(medium) for medium in some]])
        num_frames = None if num_frames is None else num_frames.to(device)
        latents.append(model.encode_media(pixels.to(device), num_frames)[0])
    return torch.cat(latents)


def _spread(latents: Tensor, identities: list[Hashable], layouts: list[Layout]) -> Tensor:
    """Latents `[N, R, D_v]` of distinct media to those of each prompt, `[P, M, R, D_v]`, padded by zeros."""
    place = {identity: place for place, identity in enumerate(identities)}
    most = max((len(layout.media) for layout in layouts), default=0)
    media = latents.new_zeros(len(layouts), most, *latents.shape[1:])
    for row, layout in enumerate(layouts):
        if layout.media:
            media[row, : len(layout.media)] = latents[[place[identity(one)] for one in layout.media]]
    return media


def identity(medium: Any) -> Hashable:
    """What two media that are one have in common: the path of a file, else being the same object."""
    return medium if isinstance(medium, Path) else id(medium)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Items in runs of a size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
