"""Train a tiny Flamingo on a folder of images and captions, and ask it about images it has not seen.

    python examples/train_on_pairs.py [--steps 200] [--folder FOLDER]

Takes about half a minute on two cores. FOLDER is where images, checkpoints and logs go; by default they
are deleted at the end. It draws squares of six colours, with their captions beside them, as `0.png` and
`0.txt`. Then it trains the resampler and the gated blocks between a frozen vision encoder and a frozen
language model, here with random weights, by the library's kernels. It prints the loss, some answers, and
how many are right.

For a CLIP and a language model of yours, and `python -m flamingo train`: docs/train_on_your_own_data.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from flamingo import Flamingo, FlamingoConfig, Processor, complete
from flamingo.training import Pairs, TrainingConfig, pair_sample, read_log, train, write_shards
from flamingo_kernels import patch

COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SIZE = 32  # of an image, in pixels


def draw(colour: str, chance: random.Random) -> Image.Image:
    """A square anywhere in a white image."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    side = chance.randint(12, 20)
    left, top = chance.randint(0, SIZE - side), chance.randint(0, SIZE - side)
    ImageDraw.Draw(image).rectangle((left, top, left + side, top + side), fill=colour)
    return image


def make_pairs(folder: Path, count: int = 240) -> None:
    """Your own folder would take the place of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        draw(colour, chance).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(colour)


def pack(pairs: Path, shards: Path) -> None:
    """Training reads tar files, in which millions of pairs are a few hundred files."""
    images = sorted(pairs.glob("*.png"))
    write_shards(
        shards, (pair_sample(Image.open(path), path.with_suffix(".txt").read_text()) for path in images)
    )


def main(folder: Path, steps: int = 200) -> None:
    make_pairs(folder / "pairs")
    pack(folder / "pairs", folder / "shards")

    torch.manual_seed(0)
    model = Flamingo(FlamingoConfig.preset("tiny", image_size=SIZE)).freeze()
    processor = Processor(image_size=SIZE)
    patch(model)

    pairs = Pairs(
        name="squares",
        shards=(str(folder / "shards"),),
        batch_size=12,
        colour=0.0,  # a recoloured image would no longer be what its caption says
        space=0.0,
        weight=1.0,
    )
    config = TrainingConfig(
        folder=str(folder / "run"),
        datasets=(pairs,),
        steps=steps,
        learning_rate=3e-3,  # the paper's is for models a thousand times as wide
        warmup_steps=10,
        bfloat16=False,
        workers=0,
        checkpoint_every=steps,
    )
    train(model, processor, config)
    losses = [update["loss"] for update in read_log(folder / "run")]
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps")

    chance = random.Random(1)
    asked = [colour for colour in COLOURS for _ in range(10)]
    unseen = [[draw(colour, chance)] for colour in asked]
    answers = complete(model.eval(), processor, unseen, max_new_tokens=8)
    for colour, answer in list(zip(asked, answers, strict=True))[::10]:
        print(f"  a {colour} square: {answer!r}")
    right = sum(answer == colour for answer, colour in zip(answers, asked, strict=True))
    print(
        f"right: {right} of {len(asked)} images that it has not seen; {len(asked) // len(COLOURS)} by chance"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.folder or Path(temporary), options.steps)
