"""A run small enough for a test: shards of all three kinds, a model, a configuration."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flamingo import Flamingo, FlamingoConfig, PretrainedLanguage, Processor
from flamingo.training import (
    Clips,
    Documents,
    Pairs,
    TrainingConfig,
    clip_sample,
    document_sample,
    pair_sample,
    write_shards,
)
from tests.helpers import language_models as families
from tests.helpers.weights import randomise

SIZES = {"documents": 7, "pairs": 9, "clips": 5}


def images(number: int, seed: int) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 9, 12, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def write(folder: Path) -> None:
    """Shards of documents, pairs and clips; two or three of each."""
    one, two, three, four, five, six = images(6, seed=0)
    documents = [["a page ", one, " of words " * (i + 1), two, f" number {i}"] for i in range(6)]
    documents.append(["no image at all"])
    write_shards(folder / "documents", map(document_sample, documents), samples_per_shard=3)
    pairs = [(image, f"picture {i}") for i, image in enumerate((one, two, three, four, five, six) * 2)][:9]
    write_shards(folder / "pairs", (pair_sample(*pair) for pair in pairs), samples_per_shard=4)
    clips = [(images(1 + i % 3, seed=i), f"clip {i}") for i in range(5)]
    write_shards(folder / "clips", (clip_sample(*clip) for clip in clips), samples_per_shard=3)


def datasets(folder: Path) -> tuple[Documents, Pairs, Clips]:
    return (
        Documents(name="pages", shards=(f"{folder}/documents/*.tar",), batch_size=2, length=40),
        Pairs(name="pairs", shards=(f"{folder}/pairs/*.tar",), batch_size=4, micro_batch_size=2),
        Clips(name="clips", shards=(f"{folder}/clips/*.tar",), batch_size=2),
    )


def config(data: Path, run: Path, **changes) -> TrainingConfig:
    fields = {
        "datasets": datasets(data),
        "steps": 4,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "bfloat16": False,
        "workers": 0,
        "shards_at_once": 2,
        "device": "cpu",
    }
    return TrainingConfig(folder=str(run), **{**fields, **changes})


def model(seed: int = 0) -> Flamingo:
    """Gates open, so that every trained parameter has a gradient; <EOC> is learned."""
    torch.manual_seed(seed)
    return randomise(Flamingo(FlamingoConfig.preset("tiny", new_tokens=(257,)))).freeze()


def pretrained() -> Flamingo:
    """With an OPT of transformers, whose embedding is its head too."""
    torch.manual_seed(0)
    language = PretrainedLanguage(families.build("opt", vocab_size=261), new_tokens=(257,))
    sizes = {"language_dim": families.WIDTH, "language_layers": families.LAYERS}
    flamingo = Flamingo(FlamingoConfig.preset("tiny", **sizes), language=language)
    for part in (flamingo.vision, flamingo.resampler, flamingo.cross_attn):
        randomise(part)
    return flamingo.freeze()


def is_frozen(name: str) -> bool:
    """Whether a parameter of this name is to stay as it is."""
    return name.startswith(("vision.", "language.")) and not name.startswith("language.new_tokens.")


def processor() -> Processor:
    return Processor(image_size=32)
