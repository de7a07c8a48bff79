"""A chat about images: `MediaCache` makes their keys and values once for all of its turns.

    python examples/media_cache_chat.py [--width 512]

Takes about twenty seconds on two cores. The first turn comes with eight images, two follow without, the
fourth brings one more. Weights, images and questions are random. The whole chat runs three times:

    as it is       every token computes the images' keys and values again
    patched        the first question does, and a turn that brings an image; other tokens reuse them
    MediaCache     they are made when images arrive, before the question is known; a new one is added

It prints how long the first token of each turn took, the whole chat, and whether all answers are the same.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from flamingo import Flamingo, FlamingoConfig, KVCache
from flamingo_kernels import MediaCache, patch

IMAGES = (8, 0, 0, 1)  # that come with each turn
QUESTION, ANSWER = 12, 8  # tokens


def build(width: int) -> Flamingo:
    torch.manual_seed(0)
    config = FlamingoConfig.preset(
        "tiny",
        language_dim=width,
        language_heads=8,
        cross_attn_heads=8,
        cross_attn_dim_head=width // 8,
        resampler_dim=width,
        num_latents=64,
        only_attend_immediate_media=False,  # text sees all images before it
        tie_embeddings=False,  # a random model would repeat its last token
    )
    model = Flamingo(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(1.0)  # closed gates, as before training, would hide the images
    return model


def images_of(model: Flamingo, turn: int) -> Tensor:
    """What vision encoder and resampler make of the images of a turn, `[1, M, R, D]`."""
    torch.manual_seed(100 + turn)
    size = model.config.image_size
    return model.encode_media(torch.randn(1, IMAGES[turn], 1, 3, size, size))


def question(model: Flamingo, turn: int) -> Tensor:
    """An `<image>` token for each new image, and some text."""
    torch.manual_seed(turn)
    images = torch.full((1, IMAGES[turn]), model.config.media_token_id)
    return torch.cat((images, torch.randint(256, (1, QUESTION))), dim=1)


def read(model: Flamingo, tokens: Tensor, media: Tensor | MediaCache, text: KVCache) -> Tensor:
    """The logits of the byte that follows. The blocks take a `MediaCache` in the place of the images."""
    begins = text.get_seq_length() == 0  # later text follows all images that were shown
    every = torch.ones(1, media.shape[1], dtype=torch.bool)
    shown = tokens == model.config.media_token_id if begins else every

    def before_layer(index: int, x: Tensor) -> Tensor:
        if str(index) not in model.cross_attn:
            return x
        seen: Tensor = model.cross_attn[str(index)](x, media, shown, not begins)
        return seen

    logits = model.language(tokens, cache=text, before_layer=before_layer, logits_to_keep=1)
    return logits[:, -1, :256]  # [1, 256]; special tokens are left out


@torch.no_grad()
def chat(model: Flamingo, cached: bool = False) -> tuple[Tensor, list[float]]:
    """The logits of all answers' tokens, and the milliseconds: to each turn's first one, and of the chat."""
    began, answers, waited = time.perf_counter(), [], []
    text, media = KVCache(), images_of(model, 0)
    cache = MediaCache(model, media) if cached else None
    for turn, new in enumerate(IMAGES):
        if turn and new:
            later = images_of(model, turn)
            media = torch.cat((media, later), dim=1)
            if cache is not None:
                cache.append(later)
        start = time.perf_counter()
        logits = read(model, question(model, turn), cache or media, text)
        waited.append(1e3 * (time.perf_counter() - start))
        for _ in range(ANSWER):
            answers.append(logits)
            logits = read(model, logits.argmax(-1, keepdim=True), cache or media, text)
    return torch.cat(answers), [*waited, 1e3 * (time.perf_counter() - began)]


def main(width: int = 512) -> None:
    model = build(width)
    chat(model)  # the first call of all is slower
    original, times = chat(model)
    print(f"as it is    {in_words(times)}")

    patch(model)
    for name, cached in (("patched", False), ("MediaCache", True)):
        chat(model, cached)
        answers, times = chat(model, cached)
        same = int((answers.argmax(-1) == original.argmax(-1)).sum())
        apart = float((answers - original).norm() / original.norm())
        print(f"{name:<10}  {in_words(times)}")
        print(f"            {same} of {len(original)} tokens are the same, logits {apart:.1e} apart")


def in_words(times: list[float]) -> str:
    *turns, chat = times
    return f"first tokens after {', '.join(f'{each:.1f}' for each in turns)} ms, the chat {chat:.0f} ms"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    main(parser.parse_args().width)
