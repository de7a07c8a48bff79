"""K and V of media, kept while a text about them is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._checks import is_recording, is_unhooked

T = TypeVar("T")

# media -> layer -> (state, K and V)
_projected: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kept_kv(
    layer: object,
    media: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[], T],
) -> T:
    """`project()`, the K and V of media; without gradients once for all decode steps, while the media live.

    Media are the same if they are views of one tensor that nobody has changed. A change that torch does not
    count, as one through `.data`, is not seen.

    Args:
        layer: whose K and V they are; they are kept while it lives.
        media: any shape; what `project` reads.
        modules: that `project` calls; nothing is kept unless each depends on its own parameters alone.
    """
    if (
        torch.is_grad_enabled()
        or is_recording(media)
        or media.is_inference()
        or not all(map(_is_leaf, modules))
    ):
        return project()
    base = media if media._base is None else media._base
    weights = [weight for module in modules for weight in _weights(module)]
    state = (
        *(media._version, media.shape, media.stride(), media.storage_offset(), media.dtype),
        *((weight.data_ptr(), weight._version) for weight in weights),
        *(torch.is_autocast_enabled(media.device.type), torch.get_autocast_dtype(media.device.type)),
    )
    layers = _projected.setdefault(base, WeakIdKeyDictionary())
    found = layers.get(layer)
    if found is None or found[0] != state:
        layers[layer] = found = (state, project())
    return cast(T, found[1])


def _is_leaf(module: nn.Module) -> bool:
    """Whether nothing but the module's own parameters, plain tensors, decides what it computes."""
    adapted = bool(module._modules)
    plain = all(type(weight) in (nn.Parameter, Tensor) for weight in _weights(module))
    # FSDP2 gathers new weights into the same tensors without counting a change.
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_unhooked(module) and plain and not adapted and not sharded


def _weights(leaf: nn.Module) -> list[Tensor]:
    """Its parameters, without the search of `parameters()` that every step of decoding would make."""
    return [weight for weight in leaf._parameters.values() if weight is not None]
