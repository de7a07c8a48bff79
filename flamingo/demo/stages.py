"""The trainings of the demo that see images, each a plain loop."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.config import FlamingoConfig, sizes
from flamingo.contrastive import ContrastiveModel, Pairs, training_step, zero_shot
from flamingo.demo.digits import MEAN, STD, TEMPLATES, Digits, episode
from flamingo.demo.words import NAMES, WordTokenizer
from flamingo.model import Flamingo, vision_encoder
from flamingo.processor import Batch, Processor

CONFIG = FlamingoConfig(
    image_size=8,
    patch_size=2,
    **sizes("vision", dim=64, layers=1, heads=4),
    **sizes("resampler", dim=64, heads=4, dim_head=16, depth=2),
    num_latents=8,
    **sizes("cross_attn", heads=4, dim_head=32),
    norm_media=True,
    **sizes("language", dim=96, layers=4, heads=4),
    vocab_size=WordTokenizer.vocab_size,
    media_token_id=WordTokenizer.image_id,
)
LENGTH = 9  # digits of a document, nouns of a list: eight shots and one that is asked
NOISE = 0.3  # of normalised pixels: 1400 digits alone are soon known by heart

Report = Callable[[int, float], None]


class NameEncoder(nn.Module):
    """The text tower of stage 1: names are single words, with one vector each."""

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(len(NAMES), dim)
        self.config = SimpleNamespace(hidden_size=dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


def pretrain_vision(
    digits: Digits, held_out: Digits, *, steps: int = 1600, seed: int = 0
) -> tuple[nn.Module, float]:
    """A vision encoder, taught which digit goes with which name, and its zero-shot accuracy."""
    generator = torch.Generator().manual_seed(seed)
    vision = vision_encoder(CONFIG)
    model = ContrastiveModel(vision, NameEncoder(64), dim=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    pixels = _normalised(digits.images)
    for _ in range(steps):
        drawn = torch.randint(len(pixels), (100,), generator=generator)
        names = digits.labels[drawn, None]
        shown = Pairs(_noisy(pixels[drawn], generator), names, torch.ones_like(names))
        training_step(model, optimizer, [shown], vision_clipping=0.1)
        schedule.step()
    names = torch.arange(len(NAMES))[:, None]
    with torch.no_grad():
        classes = model.text_embedding(names, torch.ones_like(names))
    logits = zero_shot(model, _normalised(held_out.images), classes)
    return vision, (logits.argmax(dim=1) == held_out.labels).float().mean().item()


def documents(digits: Digits, processor: Processor, *, seed: int = 0, count: int = 32) -> Iterator[Batch]:
    """Endless batches, one for each kind of document in turn: `count` documents with codes, which are learnt
    last, and a quarter as many of the others."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for kind, template in TEMPLATES.items():
            told = []
            for _ in range(count if kind == "codes" else count // 4):
                query, shots = episode(kind, digits, LENGTH - 1, generator)
                told.append([*template.prompt(query, shots), query.answer])
            batch = processor(told)
            yield batch._replace(pixels=_noisy(batch.pixels, generator))


def train(
    model: Flamingo,
    batches: Iterator[Batch],
    *,
    steps: int,
    report: Report = lambda *_: None,
) -> list[float]:
    """Train what is not frozen, each step by a batch of each kind of document; returns the losses."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gates = [p for name, p in learnt.items() if name.endswith("_gate")]
    others = [p for name, p in learnt.items() if not name.endswith("_gate")]
    # A gate is one number that starts at 0: it may move as far as many do together.
    optimizer, schedule = _optimizer([{"params": others}, {"params": gates, "lr": 3e-2}], 3e-3, steps)
    losses = []
    for step in range(steps):
        loss = torch.stack([_loss(model, next(batches)) for _ in TEMPLATES]).mean()
        update(loss, optimizer)
        schedule.step()
        losses.append(loss.item())
        report(step, losses[-1])
    return losses


def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step down the gradient, whose part of each group of parameters has length 1 at most."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()


def make_processor() -> Processor:
    """The processor of the demo's images and words."""
    return Processor(CONFIG.image_size, mean=MEAN, std=STD, tokenizer=WordTokenizer())


def _loss(model: Flamingo, batch: Batch) -> Tensor:
    loss = model(batch.input_ids, batch.pixels, batch.attention_mask, batch.labels).loss
    assert loss is not None
    return loss


def _normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return (images - mean) / std


def _noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Grey noise on normalised pixels `[..., 3, h, w]`, drawn anew each time that an image is shown."""
    return pixels + NOISE * torch.randn(pixels[..., :1, :, :].shape, generator=generator)


def _optimizer(groups: list[dict[str, Any]], lr: float, steps: int) -> tuple[Any, Any]:
    """AdamW, warmed up for 50 steps and then falling to a fiftieth."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    rate = lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
