"""The tiny models of other libraries, for the registry of `models`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import tiny
from .models import DECODE, PREFILL, STEP, Sizes, Subject, Work
from .parts import BLOCKS, RESAMPLER, VISION, labels

PARTS = {
    "open_flamingo-tiny": {"perceiver": RESAMPLER, r"lang_encoder\.gated_cross_attn_layers\.\d+": BLOCKS},
    "idefics-tiny": {
        r"model\.vision_model": VISION,
        r"model\.perceiver_resampler": RESAMPLER,
        r"model\.gated_cross_attn_layers\.\d+": BLOCKS,
    },
    "mllama-tiny": {
        r"model\.(vision_model|multi_modal_projector)": VISION,
        r"model\.language_model\.layers\.\d*[13579]": BLOCKS,
    },
}


def build(name: str, sizes: Sizes) -> Subject:
    """An entry of `MODELS`; what reads images in the language model is trained, the rest is frozen.

    Raises:
        ImportError: its library is not installed.
    """
    built = tiny.build(name, tiny.Sizes(text=sizes.text, images=sizes.media))
    model = built.model.requires_grad_(False)
    for module, part in labels(model, PARTS[name]).items():
        module.requires_grad_(part != VISION)
    for path, parameter in model.named_parameters():
        if path.endswith("k_layer_norm.bias"):  # no softmax sees it: its gradient is rounding alone
            parameter.requires_grad_(False)
    # Rounded to what every dtype can hold.
    inputs = {
        each: value.bfloat16().float() if value.is_floating_point() else value
        for each, value in built.inputs.items()
    }
    frozen = "vision and language model frozen" if VISION in PARTS[name].values() else "language model frozen"
    works = {
        PREFILL: Work(partial(_prefill, inputs), sizes.text),
        DECODE: Work(
            partial(_decode, inputs, built.tokens.shape),
            1,
            "the last token of the text, with the model's own cache, which the call crops again",
        ),
        STEP: Work(
            partial(_step, inputs, built.tokens),
            sizes.text,
            f"forward and backward, {frozen}, no optimizer",
        ),
    }
    return Subject(model, inputs, PARTS[name], works)


def _cast(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """In the dtype of a model."""
    dtype = next(model.parameters()).dtype
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def _prefill(inputs: dict[str, Tensor], model: Any) -> Callable[[], Tensor]:
    given = _cast(inputs, model)
    return lambda: model(**given, use_cache=True).logits


def _step(inputs: dict[str, Tensor], tokens: Tensor, model: Any) -> Callable[[], Tensor]:
    given = _cast(inputs, model)

    def loss() -> Tensor:
        logits = model(**given, use_cache=False).logits
        return nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])

    return loss


def _decode(inputs: dict[str, Tensor], shape: tuple[int, ...], model: Any) -> Callable[[], Tensor]:
    """The text but its last token comes before."""
    given = _cast(inputs, model)
    of_text = {name: each for name, each in given.items() if each.shape[:2] == shape}
    prompt = model(**given | {name: each[:, :-1] for name, each in of_text.items()}, use_cache=True)
    cache = prompt.past_key_values
    lengths = [layer.get_seq_length() for layer in cache.layers]
    last = {name: each[:, -1:] for name, each in of_text.items()}
    last |= {"attention_mask": given["attention_mask"], **_images_again(model, prompt)}

    def decode() -> Tensor:
        logits = model(**last, past_key_values=cache, use_cache=True).logits
        for layer, length in zip(cache.layers, lengths, strict=True):
            if layer.get_seq_length() > length:  # not the keys of images
                layer.crop(-1)
        return logits

    return decode


def _images_again(model: Any, prompt: Any) -> dict[str, Any]:
    """What a token after the prompt is given of its images."""
    if hasattr(model, "lang_encoder"):
        return {"vision_x": None}
    seen = getattr(prompt, "image_hidden_states", None)
    return {} if seen is None else {"perceiver_embeddings": seen}
