"""Turn a Flamingo's weights into 8-bit integers: compare, save, load.

    python examples/quantize.py [--width 1024] [--folder FOLDER]

Takes about half a minute on two cores. FOLDER is where the weights are saved; by default they are deleted
at the end.

It prints what was quantized, how far the logits are from those before, how long a token took before and
after, the size of the saved file, and whether a model that loads it computes the same. The weights are
random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import patch, quantize


def build(width: int) -> Flamingo:
    torch.manual_seed(0)
    config = FlamingoConfig.preset(
        "tiny",
        language_dim=width,  # at 1024, reading weights is most of what a token takes
        language_heads=16,
        language_layers=8,
        cross_attn_heads=16,
        resampler_dim=width // 4,
    )
    model = Flamingo(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.5)  # closed gates, as before training, would hide the images
    patch(model)
    return model


def prompt(model: Flamingo) -> tuple[Tensor, Tensor]:
    """A text with two images."""
    torch.manual_seed(1)
    ids = torch.randint(256, (1, 64))
    ids[0, [0, 32]] = model.config.media_token_id
    return ids, torch.randn(1, 2, 1, 3, model.config.image_size, model.config.image_size)


@torch.no_grad()
def logits(model: Flamingo) -> Tensor:
    result: Tensor = model(*prompt(model)).logits
    return result


@torch.no_grad()
def milliseconds(model: Flamingo, tokens: int = 30) -> float:
    """The median of single tokens after the prompt."""
    ids, pixels = prompt(model)
    media, cache = model.encode_media(pixels), model.language.new_cache()
    model.decode(ids, media, cache=cache)
    last, seen, taken = media[:, -1:].clone(), torch.ones(1, 1, dtype=torch.bool), []
    for _ in range(tokens):
        start = time.perf_counter()
        model.decode(ids[:, -1:], last, cache=cache, media_locations=seen)
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)[tokens // 2]


def main(folder: Path, width: int = 1024) -> None:
    model = build(width)
    before, slow = logits(model), milliseconds(model)

    report = quantize(model, vision=True, keep=False)
    print(report)
    after, fast = logits(model), milliseconds(model)

    apart = (after - before).norm() / before.norm()
    new, old = (each.flatten(0, 1).log_softmax(-1) for each in (after, before))
    divergence = torch.nn.functional.kl_div(new, old, reduction="batchmean", log_target=True)
    same = (after.argmax(-1) == before.argmax(-1)).float().mean()
    print(f"logits: {float(apart):.1%} apart, KL {float(divergence):.1e} a token,")
    print(f"  {float(same):.0%} of the likeliest tokens are the same (the weights are random)")
    print(f"a token: {slow:.1f} ms before, {fast:.1f} ms after")

    path = folder / "flamingo.safetensors"
    save_file(model.state_dict(), path)
    print(f"saved: {path.stat().st_size / 2**20:.0f} MiB")

    loaded = build(width)
    quantize(loaded, vision=True, keep=False)
    loaded.load_state_dict(load_file(path))
    print(f"loaded again: {'equal' if torch.equal(logits(loaded), after) else 'other'} logits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.folder or Path(temporary), options.width)
