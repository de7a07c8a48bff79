"""quantize and unquantize."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .._backends.dispatch import KERNEL_DTYPES, UnsupportedError
from .._kept import STEPS
from ..patch import linears
from ..patch.registry import match
from .layer import integers_of, is_quantized, quantize_layer, restore_layer
from .report import QuantizedLayer, QuantizeReport

# What vision towers are called in the models that people run, as a part of a path.
_VISION = re.compile(r"(^|[._])(vision|visual|image_encoder|protein_encoder|clip|vit)([._]|$)")


def quantize(
    model: nn.Module,
    *,
    language: bool = True,
    vision: bool = False,
    keep: bool = True,
    skip: Iterable[str] = (),
) -> QuantizeReport:
    r"""Turn the weights of a model's linear layers into 8-bit integers with a scale for each output. ::

        scale[i]      = max |weight[i]| / 127
        integers[i]   = round(weight[i] / scale[i])
        layer(x)      = x @ (scale * integers).T + bias

        quantize(model)                   until unquantize(model)
        with quantize(model): ...         until the end of the block

    For inference, and for training what is not quantized, as LoRA on top. A quarter of float32's bytes is
    left, and of the time of a decoding step, which reads weights. The layers are those of gated blocks and
    resamplers, before or after `patch`, and of the towers around them as asked.

    Args:
        model: any model; or a part of one.
        language: also the layers that are neither in gated blocks, nor in resamplers, nor in a vision tower:
            those of the language model, and its head. Default: yes.
        vision: also the layers of vision towers, which are known by the name of a part of their path:
            "vision", "visual", "image_encoder", "protein_encoder", "clip" or "vit". Default: no.
        keep: keep the originals beside the integers, so that `unquantize` restores them to the bit and
            `state_dict` returns them; a changed original gives new integers. Otherwise they are freed:
            `state_dict` returns the integers as `weight`, and their scales as `weight_scale`. Default: yes.
        skip: layers to leave alone, by path or a part of it: "lm_head", "layers.0", "mlp.down_proj".
            Default: none.

    Returns:
        The layers, with bytes before and after and the largest error of a weight of each; and what stays as
        it is, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module, or `skip` is a string.
        ValueError: a name in `skip` that fits no layer.
        UnsupportedError: no layer can be quantized, and why. The model is then unchanged.

    Limits: a layer with an adapter, a parametrisation, another class, infinite weights or a forward of its
    own stays; one whose weight is shared, as a head's with an embedding, keeps the original also without
    `keep`. Weights that integers stand for get no gradients, what flows through them does. Changes through
    `.data` are found in a sample of the weight, and under torch.compile none are. Rounding: see `linear`.
    On a GPU products of more than 64 rows make the numbers anew.

    Source: symmetric rounding to integers by output, as in LLM.int8() (arXiv 2208.07339), section 2.1.

    Example:
        >>> from flamingo import GatedCrossAttentionBlock
        >>> block = GatedCrossAttentionBlock(dim=64, dim_visual=32).eval()
        >>> with quantize(block, skip=["attn.to_q"]) as report:
        ...     sorted(report.quantized), report.skipped
        (['attn.to_kv', 'attn.to_out', 'ff.1', 'ff.3'], {'attn.to_q': 'its name is to be skipped'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(skip, str):
        raise TypeError(f"quantize: expected skip as a list of names, got {skip!r}; pass skip=[{skip!r}].")
    layers = {path: layer for path, layer, part in _layers(model) if part in _parts(language, vision)}
    reasons = _why_not(model, layers, list(skip), keep)
    shared = _shared(model)
    quantized: dict[str, QuantizedLayer] = {}
    STEPS.clear()  # they would hold the originals
    for path, layer in layers.items():
        if path in reasons:
            continue
        kept, size = keep or id(layer.weight) in shared, layer.weight.numel() * layer.weight.element_size()
        try:
            error = quantize_layer(layer, keep=kept)
        except ValueError:
            reasons[path] = "its weight has numbers that are not finite"
            continue
        integers, scale = integers_of(layer)
        quantized[path] = QuantizedLayer(size, integers.numel() + 4 * scale.numel(), error, kept)
    if not quantized:
        raise UnsupportedError(
            f"quantize: found no linear layer to quantize in {type(model).__name__}.",
            {path: [why] for path, why in reasons.items()},
        )
    return QuantizeReport(quantized, reasons, _modules=tuple(weakref.ref(layers[path]) for path in quantized))


def unquantize(model: nn.Module) -> None:
    """Restore every layer that `quantize` has changed; a model that was never quantized stays as it is.

    Args:
        model: a model, or a part or copy of one.

    Raises:
        RuntimeError: the originals of a layer were freed, as by quantize(keep=False). The model is then
            unchanged.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> before = layer.weight.clone()
        >>> _ = quantize(layer)
        >>> unquantize(layer)
        >>> type(layer) is torch.nn.Linear, torch.equal(layer.weight, before)
        (True, True)
    """
    layers = {path: layer for path, layer in model.named_modules() if is_quantized(layer)}
    freed = [path or type(layer).__name__ for path, layer in layers.items() if layer.integers is None]
    if freed:
        raise RuntimeError(
            f"unquantize: expected layers whose originals are kept, got {len(freed)} whose are freed, the "
            f"first {freed[0]}; load the original weights into a new model."
        )
    for layer in layers.values():
        restore_layer(layer)


def _parts(language: bool, vision: bool) -> set[str]:
    asked = {"language": language, "vision": vision, "between": True}
    return {part for part, wanted in asked.items() if wanted}


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Every linear layer with its path, and the part of the model that it belongs to."""
    ours: set[int] = set()
    for path, module in model.named_modules():
        if match(type(module)):
            ours.update(map(id, module.modules()))
        if linears.is_linear(module):
            tower = "vision" if _VISION.search(path) else "language"
            yield path, module, "between" if id(module) in ours else tower


def _why_not(model: nn.Module, layers: dict[str, Any], skip: list[str], keep: bool) -> dict[str, str]:
    """By path, why a layer stays as it is."""
    for name in skip:
        if not any(_is_named(path, name) for path in layers):
            raise ValueError(f"quantize: expected skip to name linear layers of the model, got {name!r}.")
    reasons = {path: why for path, _, why in linears.find(model, also_swapped=True) if why and path in layers}
    folded = set() if keep else set(_folded(model))
    for path, layer in layers.items():
        if any(_is_named(path, name) for name in skip):
            reasons[path] = "its name is to be skipped"
        elif is_quantized(layer):
            reasons[path] = "it is quantized already"
        elif layer.weight.dtype not in KERNEL_DTYPES and path not in reasons:
            reasons[path] = f"its weight is in {layer.weight.dtype}"
        elif path in folded and path not in reasons:
            reasons[path] = "fold keeps its original; unfold(model), or keep=True"
    return reasons


def _is_named(path: str, name: str) -> bool:
    """Whether a path has a name as some of its parts in a row."""
    return f".{name}." in f".{path}."


def _folded(model: nn.Module) -> Iterator[str]:
    """The paths of layers with folded weights."""
    for path, module in model.named_modules():
        for name in getattr(module, "folded", ()):
            yield f"{path}.{name}".strip(".").rpartition(".")[0]


def _shared(model: nn.Module) -> set[int]:
    """The weights that several modules have."""
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {weight for weight, count in uses.items() if count > 1}
