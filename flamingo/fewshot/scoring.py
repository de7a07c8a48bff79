"""Closed-ended tasks: each candidate is appended to the prompt and ranked by its log-likelihood."""

from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

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

    Every medium is encoded once: for all candidates, and for all prompts that hold the same object or path.

    Args:
        model: a Flamingo in eval mode, or anything with its `encode_media` and `decode`.
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

    Limits: the text of a prompt is read again for each candidate.

    Source: arXiv 2204.14198, appendix B.1.4.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> scores = log_likelihoods(model, processor, [[torch.zeros(3, 8, 8), "Output:"]], ["a cat", "a dog"])
    >>> scores.shape
    torch.Size([1, 2])
    """
    if not candidates:
        raise ValueError("log_likelihoods: expected one candidate or more, got none.")
    prompts = encode_prompts(model, processor, documents, batch_size=batch_size)
    tokenizer = processor.tokenizer
    end = [tokenizer.eoc_id] if closed else []
    answers = [[*tokenizer.encode(f" {candidate}"), *end] for candidate in candidates]
    device = prompts.input_ids.device
    scores = []
    for pairs in batches(list(product(range(len(documents)), range(len(answers)))), batch_size):
        chosen = [answers[answer] for _, answer in pairs]
        suffix = pad(chosen, tokenizer.pad_id, left=False).to(device)  # [n, L]
        counts = pad([[1] * len(answer) for answer in chosen], 0, left=False).bool().to(device)
        prompt = torch.tensor([prompt for prompt, _ in pairs], device=device)
        logits = model.decode(
            torch.cat((prompts.input_ids[prompt], suffix), dim=1),
            prompts.media[prompt],
            torch.cat((prompts.attention_mask[prompt], counts), dim=1),
            logits_to_keep=suffix.shape[1] + 1,
        )[:, :-1]  # position t predicts token t + 1
        log_p = logits.float().log_softmax(dim=-1).gather(-1, suffix[..., None])[..., 0]
        scores.append(log_p.masked_fill(~counts, 0.0).sum(dim=1).cpu())
    return torch.cat([torch.zeros(0), *scores]).reshape(len(documents), len(answers))


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
