"""The model of `[model]`: towers from folders, checked before any is loaded, and found again ever after.

::

    run/towers.json     {"vision": {"path": "clip", "sha256": "..."}, "language": ..., "checkpoint": ...}
"""

import hashlib
import json
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo.config import FlamingoConfig
from flamingo.language import PretrainedLanguage, load_mpt_1b
from flamingo.language.pretrained import FAMILIES
from flamingo.model import Flamingo
from flamingo.open_flamingo import load_open_flamingo
from flamingo.pretrained import load_whole, read_json
from flamingo.processor import Processor
from flamingo.tokenizer import ByteTokenizer, PretrainedTokenizer
from flamingo.training.config import ModelConfig
from flamingo.vision import PretrainedVision, read_preprocessing

_VISION = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
_MPT_1B = "mosaic_gpt"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_KINDS = {".json", ".safetensors", ".bin", ".model", ".txt"}  # files that a tower is made of
_PIECE, _PIECES = 2**16, 256  # what is read of a large file for its hash

Parts = tuple[dict[str, Any], Any, dict[str, Any]]  # sizes, a tower, and choices of the processor


def check(config: ModelConfig) -> None:
    """Looks at everything that a model is to be built of, and loads nothing.

    Raises:
        ValueError: for a folder or a file that is not there or is of another kind, in a line.
    """
    if config.vision is not None:
        image_size = _config(config.vision, "vision", _VISION)["image_size"]
        wanted = read_preprocessing(config.vision)["image_size"]
        if wanted != image_size:
            raise ValueError(
                f"{config.vision}: expected preprocessor_config.json to make images of {image_size} pixels, "
                f"as config.json says, got {wanted}."
            )
    if config.language is not None:
        _config(config.language, "language", (*FAMILIES, _MPT_1B))
        if not any(Path(config.language, name).exists() for name in _TOKENIZERS):
            raise ValueError(
                f"{config.language}: expected the language model's tokenizer beside it, one of "
                f"{', '.join(_TOKENIZERS)}, got none. Save it there: tokenizer.save_pretrained(folder)."
            )
    changes = dict(config.changes)
    if config.language is not None:  # whose layers are not known yet
        changes.pop("cross_attn_first", None)
    try:
        sizes = FlamingoConfig.preset(config.preset, **changes)
    except ValueError as error:
        raise ValueError(f"[model]: {str(error).removeprefix('FlamingoConfig: ')}") from error
    if config.language is None:
        _expect_bytes(sizes)
    for name in ("checkpoint", "vision_weights", "language_weights"):
        file = getattr(config, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"[model]: expected {name} to be a file, got {file}, which is none.")
        if file is not None and name != "checkpoint":
            _loaded(lambda path: import_module("safetensors").safe_open(path, framework="pt"), file)


def _expect_bytes(sizes: FlamingoConfig) -> None:
    """Raises ValueError if a model does not know the tokens of the byte tokenizer."""
    tokenizer = ByteTokenizer()
    if sizes.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"[model]: expected vocab_size to be {tokenizer.vocab_size} or more, of bytes and special "
            f"tokens, got {sizes.vocab_size}."
        )
    if sizes.media_token_id != tokenizer.image_id:  # it would see no image
        raise ValueError(
            f"[model]: expected media_token_id to be {tokenizer.image_id}, <image> of the byte tokenizer, "
            f"got {sizes.media_token_id}. Name a language, or set changes = {{ media_token_id = "
            f"{tokenizer.image_id} }}."
        )


def _config(folder: str, name: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What a folder's config.json says of a tower."""
    path = Path(folder, "config.json")
    if not Path(folder).is_dir():
        raise ValueError(f"[model]: expected {name} to be a folder, got {folder}, which is none.")
    if not path.exists():
        raise ValueError(f"{folder}: expected a model of transformers, got a folder without config.json.")
    found = read_json(path)
    kind = found.get("model_type")
    if kind not in kinds:
        raise ValueError(f"{path}: expected model_type to be one of {', '.join(kinds)}, got {kind!r}.")
    if find_spec("transformers") is None:
        raise ValueError(
            f'{folder}: expected transformers to be installed. Run pip install "transformers>=4.57.6,<6".'
        )
    return {"image_size": 224} | found.get("vision_config", found)  # the default of both is not always saved


def build(config: ModelConfig, say: Callable[[str], object]) -> tuple[Flamingo, Processor]:
    """A frozen Flamingo with its frozen parts' weights, and its processor.

    Args:
        config: see `ModelConfig`; its towers are read in float32.
        say: is told which parts are random.

    Raises:
        ValueError: if weights are missing, damaged or of other sizes.
    """
    sizes, choices, parts = dict(config.changes), dict[str, Any](), dict[str, Any]()
    for name, load in (("vision", _vision), ("language", _language)):
        folder = getattr(config, name)
        if folder is not None:
            more_sizes, parts[name], more_choices = _loaded(load, folder)
            sizes |= more_sizes
            choices |= more_choices
    model = Flamingo(FlamingoConfig.preset(config.preset, **sizes), **parts).freeze()
    for name in ("vision", "language"):
        if name not in parts:
            _set_weights(getattr(model, name), name, getattr(config, f"{name}_weights"), say)
    if config.checkpoint is not None:
        _loaded(lambda path: load_open_flamingo(model, path), config.checkpoint)
    return model, Processor(**{"image_size": model.config.image_size} | choices)


def _vision(folder: str) -> Parts:
    vision = PretrainedVision.from_pretrained(folder, **_options())
    sizes = {"vision": "given", "vision_dim": vision.dim, "image_size": vision.image_size}
    return sizes, vision, read_preprocessing(folder)


def _language(folder: str) -> Parts:
    tokenizer = _tokenizer(folder)
    if read_json(Path(folder, "config.json"))["model_type"] == _MPT_1B:
        model = load_mpt_1b(folder)
    else:
        model = load_whole(import_module("transformers").AutoModelForCausalLM, folder, **_options())
    rows, size = model.get_input_embeddings().num_embeddings, tokenizer.vocab_size
    if rows > size:  # more than there are tokens, to be divided well: open_flamingo cuts them off
        model.resize_token_embeddings(size)
    new = {tokenizer.eoc_id, tokenizer.image_id, *range(rows, size)}
    if len(new - {tokenizer.pad_id}) > 2:
        raise ValueError(
            f"expected a tokenizer of at most {rows} tokens, the rows of the model's embedding, got {size} "
            "with <|endofchunk|> and <image>. Take the model's own"
        )
    language = PretrainedLanguage(model, new_tokens=sorted(new))
    sizes = {
        "vocab_size": language.vocab_size,
        "language_dim": language.dim,
        "language_layers": language.num_layers,
        "language_heads": model.config.num_attention_heads,
        "media_token_id": tokenizer.image_id,
    }
    return sizes, language, {"tokenizer": tokenizer}


def _tokenizer(folder: str) -> PretrainedTokenizer:
    tokenizer = import_module("transformers").AutoTokenizer
    return PretrainedTokenizer.open_flamingo(
        tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def _options() -> dict[str, Any]:
    """How transformers is to read a folder: with code of its own alone, and nothing from the hub."""
    return {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}


def _loaded(load: Callable[[str], Any], path: str) -> Any:
    """What is read from a path; whatever libraries say of a damaged one becomes a ValueError of one line."""
    try:
        return load(path)
    except Exception as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ").rstrip(".")
        raise ValueError(f"{path}: {reason or type(error).__name__}.") from error


def _set_weights(part: nn.Module, name: str, path: str | None, say: Callable[[str], object]) -> None:
    if path is None:
        say(f"{name} has random weights, as [model] names neither {name} nor {name}_weights")
    else:
        _loaded(lambda path: part.load_state_dict(import_module("safetensors.torch").load_file(path)), path)


def remember(folder: Path, config: ModelConfig) -> None:
    """Writes down which towers a run has, for `expect_same`."""
    towers = _towers(config)
    if not towers:
        (folder / "towers.json").unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished-towers.json"
    unfinished.write_text(json.dumps(towers, indent=4) + "\n")
    os.replace(unfinished, folder / "towers.json")


def expect_same(folder: Path, config: ModelConfig) -> None:
    """Compares the towers of a configuration with those that the run in a folder has.

    Raises:
        ValueError: if they are others. A folder may have moved; its files may not have changed.
    """
    path = folder / "towers.json"
    then = read_json(path) if path.exists() else {}
    if not all(isinstance(tower, dict) for tower in then.values()):
        raise ValueError(f"{path}: expected what the run wrote of its towers, got something else. Remove it.")
    now = _towers(config)
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, {}), now.get(name, {})
        if before.get("sha256") != after.get("sha256"):
            raise ValueError(
                f"{path}: expected {name} to be {before.get('path', 'none')} as it was when the run began, "
                f"got {after.get('path', 'none')}{' with other files' if before and after else ''}. Put it "
                "back, or begin another run in another folder."
            )


def _towers(config: ModelConfig) -> dict[str, dict[str, str]]:
    paths = {name: getattr(config, name) for name in ("vision", "language", "checkpoint")}
    return {
        name: {"path": path, "sha256": _fingerprint(Path(path))}
        for name, path in paths.items()
        if path is not None
    }


def _fingerprint(path: Path) -> str:
    """A hash of a file, or of a folder's files that make a tower: of a large file so many pieces."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.glob("*.*") if each.suffix in _KINDS)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with open(file, "rb") as opened:
            for start in range(0, size, max(_PIECE, size // _PIECES)):
                opened.seek(start)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()
