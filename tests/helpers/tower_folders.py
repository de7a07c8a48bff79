"""Folders of tiny towers, as transformers saves them."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.helpers import language_models as families
from tests.helpers.weights import shake

SIDE = 32
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_TEXT = {**_TOWER, "vocab_size": 30}


def write_vision(folder: Path, kind: str) -> Path:
    """A CLIP or a SigLIP, its text tower included, and how it wants its images."""
    torch.manual_seed(1)
    text = {name: value for name, value in _TEXT.items() if name not in ("image_size", "patch_size")}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=_TOWER)
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config=_TOWER)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    shake(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_language(folder: Path, family: str, rows: int | None = None) -> Path:
    """A language model, with as many rows as its tokenizer has tokens or so many, and the tokenizer."""
    torch.manual_seed(2)
    tokenizer = by_bytes()
    positions = {"max_position_embeddings": 512} if family == "opt" else {}
    families.build(family, vocab_size=rows or len(tokenizer), **positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_bytes() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 258 tokens: the ends of a text and every byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE(vocab={name: id for id, name in enumerate(["<s>", "</s>", *letters])}, merges=[])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
