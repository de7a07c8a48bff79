"""Contrastive pre-training of a vision encoder on pairs of images and texts.

::

    images --> vision encoder --> mean over the grid   --> linear --> length 1  \\
                                                                                 dots of all pairs, two losses
    texts  --> text encoder   --> mean over the tokens --> linear --> length 1  /

After training `model.vision` is a Flamingo's vision encoder, `image_embedding` finds similar images, and
`zero_shot` classifies.

Source: arXiv 2204.14198, section 2.1 and appendix B.1.3.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # of the dots; CLIP's limit, the paper names none


class Pairs(NamedTuple):
    """A batch of images and their texts."""

    pixels: Tensor  # [N, 3, h, w]
    input_ids: Tensor  # int64 [N, T]
    attention_mask: Tensor  # [N, T], 0 at padding


class ContrastiveModel(nn.Module):
    """An image tower and a text tower that meet in one space, where dots are similarities.

    Args:
        vision: a vision encoder of `flamingo.vision`, or any module of that shape.
        text: an encoder of transformers, as `BertModel`: called with input_ids and attention_mask it returns
            an object with `last_hidden_state` `[N, T, D]`, and `text.config.hidden_size` is D.
        dim: width of the common space; 1376 in the paper.

    Attributes:
        log_scale: logarithm of what the dots are multiplied by, the inverse of the temperature; learnt.
            Starts at CLIP's log(1 / 0.07), as the paper does not say.

    Source: arXiv 2204.14198, appendix B.1.3.

    Example; the paper has `NFNet.preset("nfnet-f6")`, 16,384 pairs of each dataset and 1.2 M updates:
        >>> from transformers import BertConfig, BertModel
        >>> vision = VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2)
        >>> text = BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, vocab_size=200))
        >>> model = ContrastiveModel(vision, text, dim=8)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
        >>> pairs = Pairs(torch.randn(4, 3, 16, 16), torch.randint(200, (4, 5)), torch.ones(4, 5))
        >>> for batches in zip([pairs, pairs], [pairs, pairs], strict=True):
        ...     losses = training_step(model, optimizer, batches)
        ...     schedule.step()
        >>> len(losses), model.image_embedding(pairs.pixels).shape
        (2, torch.Size([4, 8]))
    """

    def __init__(self, vision: nn.Module, text: nn.Module, *, dim: int = 1376):
        super().__init__()
        self.vision = vision
        self.text = text
        self.image_projection = nn.Linear(cast(int, vision.dim), dim, bias=False)
        self.text_projection = nn.Linear(cast(Any, text.config).hidden_size, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_embedding(self, pixels: Tensor) -> Tensor:
        """pixels `[N, ..., 3, h, w]` to `[N, ..., dim]` of length 1, one an image."""
        images = pixels.flatten(0, -4)[:, None, None]  # [N, 1, 1, 3, h, w]
        pooled = self.vision(images).mean(dim=-2)[:, 0, 0]
        return F.normalize(self.image_projection(pooled), dim=-1).unflatten(0, pixels.shape[:-3])

    def text_embedding(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask `[N, T]` to `[N, dim]` of length 1; padding does not count."""
        tokens = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(tokens.dtype)[..., None]
        pooled = (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def forward(self, pairs: Pairs, *, label_smoothing: float = 0.1) -> Tensor:
        """The loss of a batch, see `contrastive_loss`."""
        images = self.image_embedding(pairs.pixels)
        texts = self.text_embedding(pairs.input_ids, pairs.attention_mask)
        return contrastive_loss(images, texts, self.log_scale.exp(), label_smoothing=label_smoothing)


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor | float, *, label_smoothing: float = 0.1
) -> Tensor:
    """The sum of two cross-entropies: which text belongs to an image, which image to a text.

    ::

        s[i, j] = scale * images[i] . texts[j]
        loss = -1/N * sum over i, j of target[i, j] * (log softmax(s[i, :])[j] + log softmax(s[:, i])[j])
        target[i, j] = label_smoothing / N, and 1 - label_smoothing more where i = j

    Args:
        images, texts: `[N, D]` of length 1, row i of one belongs to row i of the other.
        scale: the inverse temperature.
        label_smoothing: share of the target that goes to all pairs alike; 0.1 in the paper.

    Returns:
        A number; 2 log N where nothing is told apart.

    Raises:
        ValueError: if images and texts differ in shape.

    Source: arXiv 2204.14198, appendix B.1.3; CLIP's (arXiv 2103.00020, Figure 3) is half of it.

    >>> images = texts = torch.eye(4)
    >>> for scale in (0.0, 1.0, 30.0):
    ...     print(f"{contrastive_loss(images, texts, scale, label_smoothing=0.0):.3f}")
    2.773
    1.487
    0.000
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"contrastive_loss: expected one text for each image, both (N, D), got {tuple(images.shape)} and "
            f"{tuple(texts.shape)}."
        )
    scores = scale * images @ texts.T
    pairs = torch.arange(len(scores), device=scores.device)
    of_images = F.cross_entropy(scores, pairs, label_smoothing=label_smoothing)
    return of_images + F.cross_entropy(scores.T, pairs, label_smoothing=label_smoothing)


@torch.no_grad()
def clip_gradients_adaptively(
    parameters: Iterable[Tensor], clipping: float = 1e-2, *, eps: float = 1e-3
) -> None:
    """Scales down, in place, every unit's gradient that is too long for its weights.

    ::

        |gradient of a unit| <= clipping * max(|weights of the unit|, eps)

    A unit is what makes one output: a row of a matrix, a filter of a convolution; a vector or a number is one
    unit as a whole.

    Args:
        parameters: those with a gradient are clipped. Leave the last layer out, as the paper does.
        clipping: see above; 1e-2 for Flamingo's NFNet.
        eps: the least length of weights, so that what starts at 0 can leave it.

    Source: arXiv 2102.06171, section 3.

    >>> weight = torch.ones(2, 4, requires_grad=True)  # each row's length is 2
    >>> weight.grad = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0.01, 0]])
    >>> clip_gradients_adaptively([weight])
    >>> weight.grad.norm(dim=1)
    tensor([0.0200, 0.0100])
    """
    for parameter in parameters:
        if parameter.grad is not None:
            longest = clipping * _unit_norms(parameter).clamp(min=eps)
            length = _unit_norms(parameter.grad)
            parameter.grad.mul_((longest / length.clamp(min=1e-6)).clamp(max=1.0))


def _unit_norms(tensor: Tensor) -> Tensor:
    """`[...]` to the length of each unit, `[n, 1, ...]`, or of all where there is one unit."""
    if tensor.squeeze().ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


def training_step(
    model: ContrastiveModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Pairs],
    *,
    label_smoothing: float = 0.1,
    vision_clipping: float = 1e-2,
    text_clipping: float = 10.0,
) -> list[float]:
    """One update by the gradients of one batch of each dataset, added up.

    Each batch is a contrast of its own: a pair is never compared with those of another dataset. Then the
    vision encoder's gradients are clipped adaptively, the text encoder's by their common length, and the
    scale is kept at 100 at most.

    Args:
        model: to be trained.
        optimizer: of its parameters; Adam in the paper, its rate falling from 1e-3 to 0 in a straight line.
        batches: one of each dataset; in the paper ALIGN's and LTIP's.
        label_smoothing: see `contrastive_loss`.
        vision_clipping: see `clip_gradients_adaptively`.
        text_clipping: longest gradient of all the text encoder's parameters together.

    Returns:
        The loss of each batch.

    Raises:
        ValueError: without a batch.

    Limits: the gradients of the projections and the scale are not clipped. On several devices, a contrast is
    among the pairs of one.

    Source: arXiv 2204.14198, appendix B.1.3.
    """
    optimizer.zero_grad()
    losses = []
    for pairs in batches:
        loss = model(pairs, label_smoothing=label_smoothing)
        loss.backward()
        losses.append(loss.detach())
    if not losses:
        raise ValueError("training_step: expected a batch of each dataset, got none.")
    clip_gradients_adaptively(model.vision.parameters(), vision_clipping)
    nn.utils.clip_grad_norm_(model.text.parameters(), text_clipping)
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(MAX_SCALE))
    return [loss.item() for loss in losses]


Tokenize = Callable[[list[str]], Mapping[str, Tensor]]


@torch.no_grad()
def class_embeddings(
    model: ContrastiveModel,
    names: Sequence[str],
    tokenize: Tokenize,
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Tensor:
    """One embedding for each class: the mean over the templates, made length 1 again.

    Args:
        model: trained.
        names: of the classes.
        tokenize: texts to a mapping with input_ids and attention_mask, as
            `partial(tokenizer, padding=True, return_tensors="pt")` of a tokenizer of transformers.
        templates: sentences with `{}` where the name goes.

    Returns:
        `[C, dim]`.

    Source: arXiv 2103.00020, section 3.1.4.
    """
    device = model.log_scale.device
    means = []
    for name in names:
        tokens = tokenize([template.format(name) for template in templates])
        embeddings = model.text_embedding(tokens["input_ids"].to(device), tokens["attention_mask"].to(device))
        means.append(embeddings.mean(dim=0))
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def zero_shot(model: ContrastiveModel, pixels: Tensor, classes: Tensor) -> Tensor:
    """Classifies images by classes that have only names; a softmax of the result is a distribution.

    Args:
        model: trained.
        pixels: `[N, ..., 3, h, w]`.
        classes: `[C, dim]`, of `class_embeddings`.

    Returns:
        Logits `[N, ..., C]`.

    Source: arXiv 2103.00020, section 3.1.

    >>> vision = VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2)
    >>> from transformers import BertConfig, BertModel
    >>> text = BertModel(BertConfig(hidden_size=12, num_hidden_layers=1, vocab_size=200))
    >>> model = ContrastiveModel(vision, text, dim=8).eval()
    >>> def tokenize(texts):
    ...     ids = torch.tensor([list(text.encode().ljust(9)) for text in texts])
    ...     return {"input_ids": ids, "attention_mask": ids != 32}
    >>> classes = class_embeddings(model, ["cat", "dog", "bird"], tokenize, templates=["a {}", "the {}"])
    >>> zero_shot(model, torch.zeros(4, 3, 16, 16), classes).shape
    torch.Size([4, 3])
    """
    return model.log_scale.exp() * model.image_embedding(pixels) @ classes.T
