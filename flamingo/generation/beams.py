"""Beam search: the best of all texts that the likeliest beginnings lead to."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from flamingo.generation.context import Context


@torch.no_grad()
def beam_search(
    context: Context,
    logits: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
    length_penalty: float = 1.0,
) -> Tensor:
    """The best text found, by its log-likelihood over its length to the power of `length_penalty`.

    ::

        beams       a  ab  abd            in every step the num_beams likeliest texts live on;
                    c  cd  cde            one of them that ends is compared with the best so far

    A document is done when none of its beams can become better than what it has. Beams share the media and
    their keys and values; the keys and values of text are copied with every step.

    Args:
        context: has read the documents. The returned texts are added to it, to be read with what comes next.
        logits: `[B, V]`, what its last `read` returned.
        num_beams, max_new_tokens, stop_token_ids, length_penalty: see `generate`. The length counts the stop.

    Returns:
        int64 `[B, n]`; a shorter text repeats its last token.

    Source: arXiv 2204.14198, section 3: width 3 for few-shot evaluation.

    >>> context = Context(Flamingo(FlamingoConfig.preset("tiny")))
    >>> logits = context.read(torch.tensor([[65, 66]]))
    >>> beam_search(context, logits, num_beams=3, max_new_tokens=4).shape
    torch.Size([1, 4])
    """
    batch, vocabulary = logits.shape
    device, prompt = logits.device, context.length
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device)
    documents = torch.arange(batch, device=device)[:, None]
    likelihood = torch.zeros(batch, 1, device=device)  # of each beam
    texts = torch.empty(batch, 1, 0, dtype=torch.int64, device=device)  # [B, beams, n]
    found = _Found(batch, max_new_tokens, device)

    for length in range(1, max_new_tokens + 1):
        following = logits.float().log_softmax(dim=-1).unflatten(0, (batch, -1))  # [B, beams, V]
        every = (likelihood[..., None] + following).flatten(1)
        # Enough that num_beams of them go on, whichever of them end.
        likelihood, place = every.topk(min(num_beams * (1 + len(stops)), every.shape[1]))
        beam, token = place // vocabulary, place % vocabulary
        texts = torch.cat((texts[documents, beam], token[..., None]), dim=-1)

        last = length == max_new_tokens
        ends = torch.isin(token, stops) | last
        found.compare(texts, likelihood / length**length_penalty, ends, num_beams)
        likelihood = likelihood.masked_fill(ends, -torch.inf)
        # A likelihood only falls. Over a power of the length it is best at the one end or the other.
        hope = torch.maximum(
            likelihood.amax(dim=1) / (length + 1) ** length_penalty,
            likelihood.amax(dim=1) / max_new_tokens**length_penalty,
        )
        if last or (hope <= found.worth).all():
            break
        likelihood, place = likelihood.topk(min(num_beams, likelihood.shape[1]))
        texts, beam, token = texts[documents, place], beam.gather(1, place), token.gather(1, place)
        context.reorder((documents * (len(logits) // batch) + beam).flatten())
        context.add(token.flatten()[:, None])
        logits = context.step()

    context.crop(prompt)
    context.reorder(torch.arange(batch, device=device) * (len(context.attention_mask) // batch))
    return found.follow(context)


class _Found:
    """The best text of every document that has ended."""

    def __init__(self, batch: int, longest: int, device: torch.device):
        self.worth = torch.full((batch,), -torch.inf, device=device)
        self.text = torch.zeros(batch, longest, dtype=torch.int64, device=device)
        self.length = torch.ones(batch, dtype=torch.int64, device=device)

    def compare(self, texts: Tensor, worth: Tensor, ends: Tensor, num_beams: int) -> None:
        """Keeps the best that ends among the first num_beams texts `[B, n, length]`, likeliest first."""
        worth = worth[:, :num_beams].masked_fill(~ends[:, :num_beams], -torch.inf)
        best, place = worth.max(dim=1)
        text = texts[torch.arange(len(texts), device=texts.device), place]
        better = best > self.worth
        length = text.shape[1]
        self.worth = torch.where(better, best, self.worth)
        self.text[:, :length] = torch.where(better[:, None], text, self.text[:, :length])
        self.length = torch.where(better, length, self.length)

    def follow(self, context: Context) -> Tensor:
        """Adds the texts `[B, n]` to a context and returns them."""
        slots = torch.arange(int(self.length.max()), device=self.length.device)
        last = self.length[:, None] - 1
        texts = self.text.gather(1, torch.minimum(slots, last))
        context.add(texts, slots <= last)
        return texts
