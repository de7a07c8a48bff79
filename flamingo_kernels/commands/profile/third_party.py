"""The tiny models of other libraries, for the registry of `models`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...testing import tiny
from .parts import BLOCKS, RESAMPLER, VISION, labels
from .subject import DECODE, GENERATION, PREFILL, STEP, WORKS, Subject, Work

PARTS = {
    "open_flamingo-tiny": {"perceiver": RESAMPLER, r"lang_encoder\.gated_cross_attn_layers\.\d+": BLOCKS},
    "flamingo_pytorch-tiny": {"perceiver_resampler": RESAMPLER, r"layers\.\d+\.1": BLOCKS},
    "idefics-tiny": {
        r"model\.vision_model": VISION,
        r"model\.perceiver_resampler": RESAMPLER,
        r"model\.gated_cross_attn_layers\.\d+": BLOCKS,
    },
    "idefics2-tiny": {r"model\.vision_model": VISION, r"model\.connector": RESAMPLER},
    "mllama-tiny": {
        r"model\.(vision_model|multi_modal_projector)": VISION,
        r"model\.language_model\.layers\.\d*[13579]": BLOCKS,
    },
    "evolla-tiny": {
        r"model\.protein_encoder\.model": VISION,
        r"model\.protein_encoder\.sequence_compressor_resampler": RESAMPLER,
        r"model\.layers\.\d+\.adapter": BLOCKS,
    },
}
# Biases of keys: no softmax sees them, so their gradients are rounding alone.
UNSEEN = ("k_layer_norm.bias", "key_protein.bias")


def _idefics_images(prompt: Any) -> dict[str, Any]:
    """What transformers' own `generate` passes on; from 5.24 on it resamples the images for every token."""
    if hasattr(prompt, "image_outputs"):
        return {"image_encoder_embeddings": prompt.image_outputs.last_hidden_state}
    return {"perceiver_embeddings": prompt.image_hidden_states}


# What a token after the prompt is given of the images again, for each model with a cache. flamingo_pytorch
# has none, and Evolla reads the whole text and the protein for every token.
_IMAGES_AGAIN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "open_flamingo-tiny": lambda prompt: {"vision_x": None},
    "idefics-tiny": _idefics_images,
    "idefics2-tiny": lambda prompt: {},
    "mllama-tiny": lambda prompt: {},
}


def build(name: str, sizes: tiny.Sizes, *, new: int = 0, **config: Any) -> Subject:
    """An entry of `MODELS`; what reads images in the language model is trained, the rest is frozen.

    Args:
        name, config: as of `tiny.build`.
        sizes: of the model and its inputs.
        new: tokens to generate. Default: none.

    Raises:
        ImportError: its library is not installed.
    """
    built = tiny.build(name, sizes, **config)
    model = built.model.requires_grad_(False)
    for module, part in labels(model, PARTS[name]).items():
        module.requires_grad_(part != VISION)
    for path, parameter in model.named_parameters():
        if path.endswith(UNSEEN):
            parameter.requires_grad_(False)
    # Rounded to what every dtype can hold.
    inputs = {
        each: value.bfloat16().float() if value.is_floating_point() else value
        for each, value in built.inputs.items()
    }
    frozen = "vision and language model frozen" if VISION in PARTS[name].values() else "language model frozen"
    batch, length = built.tokens.shape
    trained = f"forward and backward, {frozen}, no optimizer"
    works = {
        PREFILL: Work(partial(_prefill, inputs), batch * length),
        STEP: Work(partial(_step, inputs, built.tokens), batch * length, trained),
    }
    if name in _IMAGES_AGAIN:
        decode = partial(_decode, inputs, built.tokens.shape, _IMAGES_AGAIN[name])
        note = "the last token of the text, with the model's own cache, which the call crops again"
        works[DECODE] = Work(decode, batch, note)
    if new and hasattr(model, "generate"):
        works[GENERATION] = Work(partial(_generation, inputs, new), batch * new, "the model's own generate")
    return Subject(model, inputs, PARTS[name], {name: works[name] for name in WORKS if name in works})


def _cast(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """The inputs in the dtype of a model."""
    dtype = next(model.parameters()).dtype
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def _prefill(inputs: dict[str, Tensor], model: Any) -> Callable[[], Tensor]:
    given = _cast(inputs, model)
    return lambda: _logits(model(**given))


def _step(inputs: dict[str, Tensor], tokens: Tensor, model: Any) -> Callable[[], Tensor]:
    given = _cast(inputs, model)
    if hasattr(model, "generate"):
        given["use_cache"] = False
    return lambda: _loss(_logits(model(**given)), tokens)


def _generation(inputs: dict[str, Tensor], new: int, model: Any) -> Callable[[], Tensor]:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return lambda: model.generate(**_cast(inputs, model), **options)


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of predicting every next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _decode(
    inputs: dict[str, Tensor],
    shape: tuple[int, ...],
    again: Callable[[Any], dict[str, Any]],
    model: Any,
) -> Callable[[], Tensor]:
    """A call for the last token, after one for all the text before it."""
    given = _cast(inputs, model)
    text = {name: each for name, each in given.items() if each.shape[:2] == shape}
    prompt = model(**given | {name: each[:, :-1] for name, each in text.items()}, use_cache=True)
    keyword = "cache" if "cache" in prompt else "past_key_values"  # before transformers 5.24
    cache = prompt[keyword]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    last = {name: each[:, -1:] for name, each in text.items()}
    last |= {"attention_mask": given["attention_mask"], **again(prompt)}

    def decode() -> Tensor:
        logits = model(**last, **{keyword: cache}, use_cache=True).logits
        for layer, length in zip(cache.layers, lengths, strict=True):
            if layer.get_seq_length() > length:  # not the keys of images
                layer.crop(-1)
        return logits

    return decode
