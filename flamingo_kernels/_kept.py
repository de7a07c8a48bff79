"""What is kept from one layer to the next, and from one step of generation to the next.

once    what is read of tensors, as a mask: for the layers of one forward pass
newest  what is made of media, as K and V: for the tokens that are generated after them
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from ._predicates import (
    autocast_dtype,
    is_eager,
    is_ordinary,
    is_plain,
    is_recording,
    is_transformed,
    stream_of,
)
from .mask import MediaMask, Policy
from .sublayers.arguments import is_norm

T = TypeVar("T")

_SAMPLE = 128  # numbers of a large tensor that are compared
_SMALL = 2**15  # numbers of a tensor of which all are

# In each thread: of every reader the last result, as the layers of one forward pass ask for the same, and of
# every holder what it keeps of a source. Whoever goes first takes it along.
_threads = threading.local()


class _Equal(NamedTuple):
    tensors: tuple[Tensor, ...]  # copies
    state: tuple[Any, ...]
    result: Any


class _Read(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    result: Any
    layers: set[int]  # that have it


# Of each thread the last result of each reader: the layers of one forward pass ask for the same.
_threads = threading.local()


def once(read: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any, layer: object) -> Any:
    """`read(*tensors, *options)`, or what it gave in this forward pass for these tensors, unchanged.

    A layer that asks again begins another pass, as numbers may have changed without a count since: through
    `.data`, or NumPy.
    """
    if not _may_keep(tensors) or any(tensor.is_inference() for tensor in tensors):
        return read(*tensors, *options)  # tensors of inference mode count no changes
    state = (_mode(tensors), options, *(tensor._version for tensor in tensors))
    last: _Read | None = _kept("reads").get(read)
    if last is not None and last.state == state and id(layer) not in last.layers:
        same = [ref() is tensor for ref, tensor in zip(last.tensors, tensors, strict=False)]
        if len(last.tensors) == len(tensors) and all(same):
            last.layers.add(id(layer))
            return last.result
    result = read(*tensors, *options)
    _kept("reads")[read] = _Read(tuple(map(weakref.ref, tensors)), state, result, {id(layer)})
    return result


def once_for_equal(read: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """`read(*tensors, *options)`, or what it gave for equal ones: for small tensors that are made anew."""
    if not _may_keep(tensors):
        return read(*tensors, *options)
    state = (_mode(tensors), options, *((each.dtype, each.device) for each in tensors))
    last: _Equal | None = _kept("equals").get(read)
    if last is not None and last.state == state and all(map(torch.equal, last.tensors, tensors)):
        return last.result
    result = read(*tensors, *options)
    _kept("equals")[read] = _Equal(tuple(each.detach().clone() for each in tensors), state, result)
    return result


def _kept(kind: str) -> dict[Callable[..., Any], Any]:
    kept: dict[Callable[..., Any], Any] = vars(_threads).setdefault(kind, {})
    return kept


def _may_keep(tensors: tuple[Tensor, ...]) -> bool:
    return not any(is_recording(tensor) or is_transformed(tensor) for tensor in tensors)


def _mode(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Where a result serves: not for training what inference mode made, nor on other streams."""
    return torch.is_inference_mode_enabled(), *map(stream_of, tensors)


class MaskKey(NamedTuple):
    """What a mask depends on beside the locations.

    length is None unless the media are cached; texts is how many in a row share a sequence of media.
    """

    num_media: int
    immediate: bool
    policy: Policy
    length: int | None
    texts: int = 1

    def build(self, locations: Tensor) -> MediaMask:
        num_media, immediate, policy, length, texts = self
        if length is not None:
            mask = MediaMask.cached(locations, num_media, length, immediate=immediate, policy=policy)
        else:
            build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
            mask = build(locations, num_media, policy=policy)
        return mask if texts == 1 else mask.fold(texts)


def kept_mask(locations: Tensor, key: MaskKey, layer: object) -> MediaMask:
    """The mask of these locations: the one that a layer before this one built in the same forward pass."""
    return cast(MediaMask, once(_build, (locations,), key, layer=layer))


def _build(locations: Tensor, key: MaskKey) -> MediaMask:
    return key.build(locations)


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    samples: list[Tensor]
    result: Any


def kept_kv(
    layer: object,
    media: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[], T],
    *,
    step: bool,
) -> T:
    """`project()`, the K and V of media, made anew for every text and kept for what is generated after it.

    Args:
        layer: whose K and V they are; it keeps its newest, as `newest` does.
        media: any shape; what `project` reads.
        modules: that `project` calls; nothing is kept unless each depends on its own parameters alone.
        step: whether the text goes on from an earlier call, so that K and V of that may serve.
    """
    if torch.is_grad_enabled() or is_recording(media) or not all(map(_is_leaf, modules)):
        return project()
    weights = [weight for module in modules for weight in _weights(module)]
    base = media if media._base is None else media._base
    return newest(layer, base, (media, *weights), project, reuse=step)


def newest(
    holder: object, source: object, tensors: tuple[Tensor, ...], make: Callable[[], T], *, reuse: bool
) -> T:
    """`make()`, or without gradients, and with `reuse`, what it gave last for this holder.

    That must have been for the same source and the same tensors, by their memory and their count of changes.
    A change that torch does not count, as through `.data` or NumPy, shows on a CPU in the numbers, of large
    tensors in a sample; on a GPU one would have to wait for them. Each thread and stream sees only what it
    made itself.

    Args:
        holder: it keeps one result, in each thread, while it and the source live.
        source: what the result is made of.
        tensors: all that `make` reads.
        make: gives the result, in which the holder and the source may not appear.
        reuse: whether the last result may serve.
    """
    if torch.is_grad_enabled() or not all(map(_is_known, tensors)):
        return make()
    kept = vars(_threads).setdefault("kept", WeakIdKeyDictionary())
    state, samples = _state(tensors), [_sample(tensor) for tensor in tensors if tensor.device.type == "cpu"]
    last: _Kept | None = kept.get(holder, {}).get(source) if reuse else None
    if last is not None and last.state == state and all(map(torch.equal, last.samples, samples)):
        return cast(T, last.result)
    kept.pop(holder, None)  # before there are new ones: two would need twice the memory
    result = make()
    kept[holder] = of_source = WeakIdKeyDictionary()
    of_source[source] = _Kept(state, samples, result)
    return result


def _is_known(tensor: Tensor) -> bool:
    """Whether it has memory of its own, of which torch counts the changes."""
    plain = not is_recording(tensor) and is_eager(tensor) and not is_transformed(tensor)
    return plain and not tensor.is_inference()


def _state(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What changes with the tensors, or with how they would be multiplied now.

    The memory is held weakly, so that no other can come to have its address.
    """
    return tuple(
        (
            *(StorageWeakRef(each.untyped_storage()), each.storage_offset(), each.shape, each.stride()),
            *(each.dtype, each._version, stream_of(each), autocast_dtype(each.device)),
        )
        for each in tensors
    )


def _sample(tensor: Tensor) -> Tensor:
    """A copy of all numbers of a small tensor, and of some from all over a large one's memory."""
    if tensor.numel() <= _SMALL:
        return tensor.clone()
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span <= _SMALL:  # of a tensor that is broadcast
        return tensor.as_strided((span,), (1,)).clone()
    step = (span - 1) // (_SAMPLE - 1)
    return tensor.as_strided((_SAMPLE,), (step - 1 + step % 2,)).clone()  # odd, so not of one column alone


def _is_leaf(module: nn.Module) -> bool:
    """Whether nothing but the module's own parameters, plain tensors, decides what it computes."""
    known = is_plain(module, nn.Linear) or is_norm(module)
    plain = all(map(is_ordinary, _weights(module)))
    # FSDP2 gathers new weights into the same tensors without counting a change.
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return known and plain and not module._modules and not sharded


def _weights(leaf: nn.Module) -> list[Tensor]:
    """Its parameters, without the search of `parameters()` that every step of decoding would make."""
    return [weight for weight in leaf._parameters.values() if weight is not None]
