"""Turn a Flamingo's weights into 8-bit integers: compare, save, load.

    python examples/quantize.py [FOLDER]

Takes about a minute on two cores. FOLDER is where the weights are saved; by default they go with the process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import patch, quantize

# Random weights, a width at which reading them is what a token takes, and open gates.
CONFIG = FlamingoConfig.preset(
    "tiny", language_dim=1024, language_heads=16, language_layers=8, cross_attn_heads=16, resampler_dim=256
)


def build() -> Flamingo:
    torch.manual_seed(0)
    model = Flamingo(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.5)
    patch(model)
    return model


def prompt() -> tuple[Tensor, Tensor]:
    """A text with two images."""
    torch.manual_seed(1)
    ids = torch.randint(256, (1, 64))
    ids[0, [0, 32]] = CONFIG.media_token_id
    return ids, torch.randn(1, 2, 1, 3, CONFIG.image_size, CONFIG.image_size)


@torch.no_grad()
def logits(model: Flamingo) -> Tensor:
    return model(*prompt()).logits


@torch.no_grad()
def milliseconds(model: Flamingo, tokens: int = 30) -> float:
    """The median of single tokens after the prompt."""
    ids, pixels = prompt()
    media, cache = model.encode_media(pixels), model.language.new_cache()
    model.decode(ids, media, cache=cache)
    last, seen, taken = media[:, -1:].clone(), torch.ones(1, 1, dtype=torch.bool), []
    for _ in range(tokens):
        start = time.perf_counter()
        model.decode(ids[:, -1:], last, cache=cache, media_locations=seen)
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)[tokens // 2]


def main(folder: Path) -> None:
    model = build()
    before, slow = logits(model), milliseconds(model)

    report = quantize(model, vision=True, keep=False)
    print(report)
    after, fast = logits(model), milliseconds(model)

    divergence = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True
    )
    same = (after.argmax(-1) == before.argmax(-1)).float().mean()
    print(f"logits: {float((after - before).norm() / before.norm()):.1%} apart, KL {float(divergence):.1e},")
    print(f"  {float(same):.0%} of the likeliest tokens are the same (the weights are random)")
    print(f"a token: {slow:.1f} ms before, {fast:.1f} ms after")

    path = folder / "flamingo.safetensors"
    save_file(model.state_dict(), path)
    print(f"saved: {path.stat().st_size / 2**20:.0f} MiB")

    loaded = build()
    quantize(loaded, vision=True, keep=False)
    loaded.load_state_dict(load_file(path))
    print(f"loaded again: {'equal' if torch.equal(logits(loaded), after) else 'other'} logits")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
