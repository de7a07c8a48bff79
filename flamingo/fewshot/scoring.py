"""Closed-ended tasks: each candidate is appended to the prompt and ranked by its log-likelihood."""

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flamingo.fewshot.prompts import Sample, Template
from flamingo.generation import Context, Latents, Prompt
from flamingo.generation.prompts import EncodedPrompts, encode, lay_out, reading, together
from flamingo.media import Segment
from flamingo.processor import Processor, pad

T = TypeVar("T")


@torch.no_grad()
def log_likelihoods(
    model: Any,
    processor: Processor,
    documents: Sequence,
    candidates: Sequence[str],
    *,
    closed: bool = True,
    batch_size: int = 8,
    after: Prompt | None = None,
    latents: Latents | None = None,
) -> Tensor:
    """How likely each candidate is after each prompt.

    ::

        score[p, c] = sum over the tokens t of candidate c of log P(t | prompt p, the tokens before t)

    P leaves out `<image>`, as in generation. Every medium is encoded once, for all candidates and all prompts
    that hold it, and every prompt is read once.

    Args:
        model: a Flamingo in eval mode.
        processor: of the model.
        documents: P prompts, as `Template.prompt` makes them.
        candidates: C texts; a space is put in front of each.
        closed: count the `<EOC>` after a candidate too, so that "cat" is not every "cathedral". The paper
            does not say.
        batch_size: how many pairs of prompt and candidate, or media, the model is given at once.
        after: a prompt of `read_prompt` that comes before each of them.
        latents: of media that may be encoded already; by default each is encoded once a call.

    Returns:
        float32 `[P, C]`.

    Raises:
        ValueError: without candidates.

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
    latents = Latents(model, processor, batch_size=batch_size) if latents is None else latents
    layouts = lay_out(processor, documents, after)
    scores = torch.zeros(len(layouts), len(answers))
    for places in together(layouts, batch_size, after):
        prompts = encode([layouts[place] for place in places], processor, latents, after)
        with reading(model, len(places), after) as context:
            scores[places] = _score(context, prompts, answers, batch_size)
    return scores


def _score(context: Context, prompts: EncodedPrompts, answers: list[list[int]], batch_size: int) -> Tensor:
    """Prompts that are read at once, to `[P, C]`."""
    count = len(prompts.input_ids)
    after_prompt = context.read(prompts.input_ids, None, prompts.attention_mask, media=prompts.media)
    first_log_p = after_prompt.float().log_softmax(dim=-1)  # [P, V]
    device = first_log_p.device
    at_once = min(len(answers), max(1, batch_size // count))
    if at_once > 1:
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
    latents: Latents | None = None,
) -> Tensor:
    """The mean of `log_likelihoods` over random orders of the shots, float32 `[C]`.

    Args:
        model, processor, candidates, batch_size, latents: see `log_likelihoods`.
        template, query, shots: of the prompt.
        permutations: number of orders; 6 in the paper.
        generator: of the orders; torch's own by default.

    Source: arXiv 2204.14198, appendix B.1.4.
    """
    orders = [torch.randperm(len(shots), generator=generator).tolist() for _ in range(permutations)]
    documents = [template.prompt(query, [shots[place] for place in order]) for order in orders]
    scores = log_likelihoods(model, processor, documents, candidates, batch_size=batch_size, latents=latents)
    return scores.mean(dim=0)


def identity(medium: Any) -> Hashable:
    """What two media that are one have in common: the file, or part of it, else being the same object."""
    if isinstance(medium, Path):
        return _resolved(medium)
    if isinstance(medium, Segment):
        return _resolved(medium.path), medium.start, medium.end
    return id(medium)


@lru_cache(maxsize=2**18)
def _resolved(path: Path) -> Path:
    """One path, however it is written and whatever links lead there."""
    return path.resolve()


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Items in runs of a size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
