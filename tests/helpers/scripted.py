"""Models that say what is known beforehand, and datasets on disk for them."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from flamingo import Flamingo, FlamingoConfig, Processor, generate, text_time
from tests.helpers.weights import randomise

SHADES = {"black": 0, "grey": 128, "white": 255}
PROCESSOR = Processor(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def picture(shade):
    return np.full((8, 8, 3), SHADES[shade], dtype=np.uint8)


class Namer(nn.Module):
    """After a colon it names the shade of the image that it sees, closes, and goes on with another shot."""

    config = FlamingoConfig.preset("tiny")

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # for its device
        self.vision = Brightness()
        self.language = SimpleNamespace(new_cache=Read)
        self.resampler = SimpleNamespace(latents=torch.zeros(1, 1))
        self.encoded = self.answered = 0

    def encode_media(self, features, num_frames=None):
        self.encoded += features.shape[0] * features.shape[1]
        return features[..., :1].mean(dim=2)

    def decode(
        self, input_ids, media, attention_mask=None, *, cache=None, media_locations=None, logits_to_keep=0
    ):
        cache = Read() if cache is None else cache
        cache.ids = torch.cat((cache.ids.expand(len(input_ids), -1), input_ids), dim=1)
        logits = torch.zeros(*cache.ids.shape, 261)
        times = text_time(cache.ids == 256)
        media = media.repeat_interleave(len(input_ids) // len(media), dim=0)
        for row, ids in enumerate(cache.ids.tolist()):
            for place in range(len(ids)):
                colons = [before for before in range(place + 1) if ids[before] == ord(":")]
                if colons and times[row, place]:
                    seen = -1 if media_locations is not None else times[row, place] - 1
                    script = self.script(media[row, seen].item())
                    logits[row, place, script[place - colons[-1]]] = 5.0
        return logits[:, -(logits_to_keep or input_ids.shape[1]) :]

    def script(self, brightness):
        name = min(SHADES, key=lambda shade: abs(SHADES[shade] / 255 - brightness))
        ids = PROCESSOR.tokenizer.encode(f" {name}<EOC>Output: what comes of not stopping")
        return ids + [0] * 100

    def generate(
        self, input_ids, pixels, attention_mask, *, media, context, max_new_tokens, num_beams, stop_token_ids
    ):  # what `complete` asks for
        self.num_beams = num_beams
        self.answered += len(input_ids)
        options = {"max_new_tokens": max_new_tokens, "context": context}
        return generate(self, input_ids, pixels, attention_mask, media=media, **options)


class Read:
    """A cache that is the text itself."""

    def __init__(self):
        self.ids = torch.zeros(1, 0, dtype=torch.int64)

    def get_seq_length(self):
        return self.ids.shape[1]

    def reorder_cache(self, rows):
        self.ids = self.ids[rows]

    def batch_repeat_interleave(self, repeats):
        self.ids = self.ids.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove):
        self.ids = self.ids[:, :tokens_to_remove]


class Brightness(nn.Module):
    """One feature a frame: its mean, and a constant."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, pixels):
        mean = pixels.mean(dim=(3, 4, 5))
        return torch.stack((mean, torch.ones_like(mean)), dim=-1)[..., None, :]  # [B, M, F, 1, 2]


def namer():
    """What `--model` names."""
    return Namer(), PROCESSOR


class Watched(Flamingo):
    """A small Flamingo that logs how many prompts it answers, and may stop for good on its way."""

    batches = 0

    def generate(self, input_ids, pixels, *args, **options):
        if self.batches == int(os.environ.get("FLAMINGO_TEST_STOP_AFTER", "-1")):
            time.sleep(300)
        self.batches += 1
        with open(os.environ["FLAMINGO_TEST_LOG"], "a") as log:
            log.write(f"{len(input_ids)}\n")
        return super().generate(input_ids, pixels, *args, **options)


def watched():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Watched(FlamingoConfig.preset("tiny", tie_embeddings=False))
    nn.init.normal_(model.language.embedding.weight)
    for part in (model.resampler, model.cross_attn):
        randomise(part)
    return model, Processor(image_size=32)


def write_images(folder: Path, shades, name: str) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number, shade in enumerate(shades):
        Image.fromarray(picture(shade)).save(folder / name.format(number))


def write_vqa(folder: Path, shades, answers=None) -> dict[str, Path]:
    """One question an image, with ten answers each: its shade, or what `answers` has."""
    write_images(folder, shades, "COCO_val2014_{:012d}.png")
    questions = [
        {"question_id": 100 + number, "image_id": number, "question": "What colour is it?"}
        for number in range(len(shades))
    ]
    annotations = [
        {
            "question_id": 100 + number,
            "image_id": number,
            "multiple_choice_answer": shade,
            "answers": [
                {"answer": one, "answer_id": i}
                for i, one in enumerate((answers or {}).get(number, [shade] * 10))
            ],
        }
        for number, shade in enumerate(shades)
    ]
    paths = {
        "questions": folder / "questions.json",
        "annotations": folder / "annotations.json",
        "images": folder,
    }
    paths["questions"].write_text(json.dumps({"info": {}, "questions": questions}))
    paths["annotations"].write_text(json.dumps({"info": {}, "annotations": annotations}))
    return paths


def write_captions(folder: Path, captions) -> dict[str, Path]:
    """Pairs of a shade and the captions of its image."""
    write_images(folder, [shade for shade, _ in captions], "{:03d}.png")
    images = [{"id": number, "file_name": f"{number:03d}.png"} for number in range(len(captions))]
    annotations = [
        {"id": 10 * number + i, "image_id": number, "caption": text}
        for number, (_, texts) in enumerate(captions)
        for i, text in enumerate(texts)
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"captions": folder / "captions.json", "images": folder}
