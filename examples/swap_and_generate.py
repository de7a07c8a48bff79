"""Swap the layers of a transformers model for fast ones, and generate the same text.

    python examples/swap_and_generate.py [--width 512] [--tokens 32]

Takes about half a minute on two cores, and downloads nothing: the model is an Idefics from a
configuration, with random weights. It prints what was swapped, whether the tokens before and after are
the same, and how many were generated a second. A narrow model gains little: Python takes most of its
time, not arithmetic.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from flamingo_kernels import patch, unpatch

IMAGE_SIZE, IMAGES, TEXT = 32, 8, 128


def build(width: int) -> IdeficsForVisionText2Text:
    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=1000,
        additional_vocab_size=0,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        cross_layer_interval=2,  # a gated block in front of every second layer
        alpha_initializer="ones",  # open gates: closed ones would hide the images
        use_resampler=True,
        vision_config={
            "embed_dim": width // 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * width,
        },
        perceiver_config={"use_resampler": True, "resampler_n_heads": 4, "resampler_head_dim": width // 8},
    )
    return IdeficsForVisionText2Text(config).eval()


def prompt() -> dict[str, Tensor]:
    """A text with eight images, each of them seen by the text up to the next one."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 1000, (1, TEXT))
    seen = torch.zeros(1, TEXT, IMAGES, dtype=torch.long)
    for image in range(IMAGES):
        start = image * TEXT // IMAGES
        seen[:, start : start + TEXT // IMAGES, image] = 1
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(1, IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE),
        "image_attention_mask": seen,
    }


def generate(model: IdeficsForVisionText2Text, tokens: int) -> tuple[Tensor, float]:
    """The new tokens, and how many were made in a second."""
    start = time.perf_counter()
    text = model.generate(**prompt(), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return text[0, TEXT:], tokens / (time.perf_counter() - start)


def main(width: int = 512, tokens: int = 32) -> None:
    model = build(width)
    generate(model, tokens=2)  # the first call of all is slower
    before, slow = generate(model, tokens)

    print(patch(model))
    generate(model, tokens=2)
    after, fast = generate(model, tokens)

    same = int((before == after).sum())
    print(f"the same tokens: {same} of {tokens}")
    print(f"tokens/s: {slow:.1f} before, {fast:.1f} after")

    unpatch(model)  # the model is as it was
    again, _ = generate(model, tokens)
    print(f"and after unpatch: {int((before == again).sum())} of {tokens}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    main(options.width, options.tokens)
