"""A whole model in one file: its weights, its sizes and how its processor makes pixels and tokens."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from flamingo.config import FlamingoConfig
from flamingo.language import LanguageModel
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.tensor_files import save_tensors

# By their names in a file: tokenizers that need nothing but their class.
_TOKENIZERS = {"bytes": "flamingo.tokenizer:ByteTokenizer", "words": "flamingo.demo.words:WordTokenizer"}


def save_model(model: Flamingo, processor: Processor, path: str | Path) -> None:
    """Writes a model as safetensors, for `load_model`.

    Args:
        model: whose towers are of this package; of others only the names of their folders could be kept, as
            the TOML file of a run does.
        processor: of the model.
        path: of the file.

    Raises:
        ValueError: for towers or a tokenizer of other libraries.
        ImportError: without safetensors.
        OSError: if it cannot be written; what was there stays.
    """
    if model.config.vision == "given" or not isinstance(model.language, LanguageModel):
        raise ValueError(
            f"save_model: expected towers of this package, got {type(model.vision).__name__} and "
            f"{type(model.language).__name__}. Name their folders in the TOML file of a run instead."
        )
    about = {"config": asdict(model.config), "processor": _about(processor)}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    save_tensors(model.state_dict(), path, metadata)


def load_model(path: str | Path) -> tuple[Flamingo, Processor]:
    """The model of a file that `save_model` wrote, in eval mode, and its processor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another file.
        ImportError: without safetensors.
    """
    safetensors = import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a saved model, got a file that cannot be read: {error}."
        ) from error
    if not about.keys() >= {"config", "processor"}:
        raise ValueError(
            f"{path}: expected a model of flamingo.saved.save_model, got safetensors of something else."
        )
    try:
        return _built(path, about)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a model of this release, got another: {reason}.") from error


def _built(path: str | Path, about: dict[str, str]) -> tuple[Flamingo, Processor]:
    sizes = json.loads(about["config"])
    sizes["new_tokens"] = tuple(sizes["new_tokens"])
    options = json.loads(about["processor"])
    module, _, name = _TOKENIZERS[options.pop("tokenizer")].partition(":")
    processor = Processor(**options, tokenizer=getattr(import_module(module), name)())
    model = Flamingo(FlamingoConfig(**sizes))
    model.load_state_dict(import_module("safetensors.torch").load_file(path))
    return model.eval(), processor


def _about(processor: Processor) -> dict[str, Any]:
    """What `Processor` is to be given."""
    kind = f"{type(processor.tokenizer).__module__}:{type(processor.tokenizer).__name__}"
    tokenizer = next((name for name, known in _TOKENIZERS.items() if known == kind), None)
    if tokenizer is None:
        raise ValueError(
            f"save_model: expected a tokenizer of this package, got {type(processor.tokenizer).__name__}. "
            "Name its folder in the TOML file of a run instead."
        )
    options = ("image_size", "fit", "resample", "max_media", "fps", "max_frames", "max_pixels")
    return {
        **{name: getattr(processor, name) for name in options},
        "mean": processor.mean.flatten().tolist(),
        "std": processor.std.flatten().tolist(),
        "tokenizer": tokenizer,
    }
