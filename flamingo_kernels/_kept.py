"""Results that are kept from one layer to the next, and from one step of generation to the next.

once            a result read from tensors, as a mask: for all layers of one forward pass
once_for_equal  the same for small tensors that are made anew, and mostly equal
newest          a result made of media, as K and V: for the tokens that are generated after them
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
    current_stream,
    is_eager,
    is_plain,
    is_recording,
    is_transformed,
    is_unhooked,
)
from .mask import MediaMask, Policy
from .sublayers.arguments import is_norm

T = TypeVar("T")

_SAMPLE = 128  # how many numbers of a large tensor are compared
_SMALL = 2**15  # tensors up to this size are compared whole

# A block as the operator of a decoding step takes it, see layers/decode.py: with its weights.
STEPS = WeakIdKeyDictionary()

# Each thread keeps the last result of every reader, for the layers of one forward pass, and one result of
# every holder, which goes when the holder or the source of the result does.
_threads = threading.local()


class _Equal(NamedTuple):
    tensors: tuple[Tensor, ...]  # copies
    state: tuple[Any, ...]
    result: Any


class _Read(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    result: Any
    layers: set[int]  # ids of the layers that have asked for it


def once(read: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any, layer: object) -> Any:
    """`read(*tensors, *options)`, or its result from earlier in this forward pass if no tensor has changed.

    A layer that asks a second time begins another pass: since then numbers may have changed in ways that
    torch does not count, as through `.data` or NumPy.
    """
    if not _may_keep(tensors) or any(tensor.is_inference() for tensor in tensors):
        return read(*tensors, *options)  # torch counts no changes of tensors made in inference mode
    state = (_mode(tensors), options, *(tensor._version for tensor in tensors))
    last: _Read | None = _last("reads").get(read)
    if last is not None and last.state == state and id(layer) not in last.layers:
        same = [ref() is tensor for ref, tensor in zip(last.tensors, tensors, strict=True)]
        if all(same):
            last.layers.add(id(layer))
            return last.result
    result = read(*tensors, *options)
    _last("reads")[read] = _Read(tuple(map(weakref.ref, tensors)), state, result, {id(layer)})
    return result


def once_for_equal(read: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """`read(*tensors, *options)`, or its last result if that came from equal tensors, best small ones."""
    if not _may_keep(tensors):
        return read(*tensors, *options)
    state = (_mode(tensors), options, *((each.dtype, each.device) for each in tensors))
    last: _Equal | None = _last("equals").get(read)
    if last is not None and last.state == state and all(map(torch.equal, last.tensors, tensors)):
        return last.result
    result = read(*tensors, *options)
    _last("equals")[read] = _Equal(tuple(each.detach().clone() for each in tensors), state, result)
    return result


def _last(kind: str) -> dict[Callable[..., Any], Any]:
    """The last results of this thread, by reader."""
    results: dict[Callable[..., Any], Any] = vars(_threads).setdefault(kind, {})
    return results


def _may_keep(tensors: tuple[Tensor, ...]) -> bool:
    return not any(is_recording(tensor) or is_transformed(tensor) for tensor in tensors)


def _mode(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The mode and streams in which a result may serve: a tensor of inference mode cannot serve training."""
    return torch.is_inference_mode_enabled(), *map(current_stream, tensors)


class MaskKey(NamedTuple):
    """What a mask depends on beside the locations.

    Attributes:
        num_media: M.
        immediate: whether text sees the last medium only.
        policy: for rows without a medium, see `MediaMask`.
        length: T if the text follows the locations, None if it is the text of the locations.
        texts: how many texts in a row share a sequence of media.
        adds: whether numbers in the locations are added up, as in open_flamingo; else each but 0 is a medium.
        ahead: whether text sees the medium after it, in bool locations.
    """

    num_media: int
    immediate: bool
    policy: Policy
    length: int | None
    texts: int = 1
    adds: bool = False
    ahead: bool = False

    def build(self, locations: Tensor) -> MediaMask:
        num_media, immediate, policy, length, texts, adds, ahead = self
        if ahead:
            time = _next_medium(locations)
            mask = MediaMask.from_text_time(time, num_media, immediate=immediate, policy=policy)
        elif adds and length is None and locations.dtype != torch.bool:
            time = locations.cumsum(1)
            if immediate:  # a row below 0 names no medium, and averages all
                time = time.where(time >= 0, num_media + 1)
            mask = MediaMask.from_text_time(time, num_media, immediate=immediate, policy=policy)
        elif length is not None:
            mask = MediaMask.cached(locations, num_media, length, immediate=immediate, policy=policy)
        else:
            build = MediaMask.last_preceding if immediate else MediaMask.all_preceding
            mask = build(locations, num_media, policy=policy)
        return mask if texts == 1 else mask.fold(texts)


def _next_medium(locations: Tensor) -> Tensor:  # [B, T]
    """The number of a token's own medium, or of the next one; 0 where none comes."""
    if locations.dtype != torch.bool:
        raise TypeError(f"MaskedCrossAttention: expected bool media_locations, got {locations.dtype}.")
    time = locations.cumsum(1) + ~locations
    return time.where(time <= locations.sum(1, keepdim=True), 0)


def kept_mask(locations: Tensor, key: MaskKey, layer: object) -> MediaMask:
    """The mask for these locations, built by the first layer of a forward pass that asks.

    The tokens that follow a text ask for the same again and again. On a CPU it costs less to see that.
    """
    read = _build_or_keep if key.length == 1 and locations.is_cpu else _build
    return cast(MediaMask, once(read, (locations,), key, layer=layer))


def _build(locations: Tensor, key: MaskKey) -> MediaMask:
    return key.build(locations)


def _build_or_keep(locations: Tensor, key: MaskKey) -> MediaMask:
    return cast(MediaMask, once_for_equal(_build, (locations,), key))


class Snapshot:
    """What tells whether tensors have changed since, in a way that torch counts or on a CPU in any.

    It refers to their memory weakly, which keeps its address from being given to other memory. The numbers of
    small tensors are compared whole, of large ones a sample.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = tuple(tensors)
        self._state = _state(tensors)
        self._storages = [StorageWeakRef(each.untyped_storage()) for each in tensors]
        self._samples = [sample.clone() for sample in _samples(tensors)]

    def is_of(self, tensors: Iterable[Tensor]) -> bool:
        tensors = tuple(tensors)
        return self._state == _state(tensors) and all(map(torch.equal, self._samples, _samples(tensors)))


class _Kept(NamedTuple):
    snapshot: Snapshot
    result: Any


def kept_kv(
    layer: object,
    media: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[], T],
    *,
    step: bool,
    also: Callable[[nn.Module], bool] = lambda module: False,
) -> T:
    """`project()`, the K and V of media: made anew for every text, and kept for the tokens that follow it.

    Args:
        layer: the layer whose K and V they are; it keeps the newest ones, see `newest`.
        media: any shape; what `project` reads.
        modules: the modules that `project` calls; nothing is kept unless each depends on its own parameters
            alone.
        step: whether the text continues an earlier call, whose K and V may then serve.
        also: says of a module of another library whether it depends on its own parameters alone.
    """
    may_keep = not is_recording(media) and not _are_sharded()
    if not may_keep or not all(_is_leaf(module) or also(module) for module in modules):
        return project()
    weights = [weight for module in modules for weight in _weights(module)]
    base = media if media._base is None else media._base
    return newest(layer, base, (media, *weights), project, reuse=step)


def grows(holder: object, length: int) -> bool:
    """Whether a text is longer than the holder's last one, as where each step repeats the text before it."""
    lengths = vars(_threads).setdefault("lengths", WeakIdKeyDictionary())
    last = lengths.get(holder, length)
    lengths[holder] = length
    return length > last


def newest(
    holder: object, source: object, tensors: tuple[Tensor, ...], make: Callable[[], T], *, reuse: bool
) -> T:
    """`make()`, or with `reuse` and without gradients the holder's last result, if nothing has changed.

    The source must be the same object, and the tensors must have the same memory and count of changes. torch
    does not count a change through `.data` or NumPy. On a CPU the numbers are compared too, a sample of them
    for large tensors; on a GPU reading them would mean waiting, so there such a change is not seen. A result
    serves only the thread and the stream that made it.

    Args:
        holder: the object that keeps one result in each thread, while it and the source live.
        source: the object that the result is made of.
        tensors: all tensors that `make` reads.
        make: makes the result, which must not refer to the holder or the source.
        reuse: whether the last result may serve.
    """
    if torch.is_grad_enabled() or not all(map(counts_changes, tensors)):
        return make()
    kept = vars(_threads).setdefault("kept", WeakIdKeyDictionary())
    last: _Kept | None = kept.get(holder, {}).get(source) if reuse else None
    if last is not None and last.snapshot.is_of(tensors):
        return cast(T, last.result)
    kept.pop(holder, None)  # before `make` runs, as two results would need twice the memory
    snapshot, result = Snapshot(tensors), make()
    kept[holder] = by_source = WeakIdKeyDictionary()
    by_source[source] = _Kept(snapshot, result)
    return result


def counts_changes(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own whose changes torch counts."""
    plain = not is_recording(tensor) and is_eager(tensor) and not is_transformed(tensor)
    return plain and not tensor.is_inference()


def _state(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Values that differ if torch counts a change, or would multiply the tensors in another dtype now."""
    return tuple(
        (
            *(each.untyped_storage()._cdata, each.storage_offset(), each.shape, each.stride()),
            *(each.dtype, each._version, current_stream(each), autocast_dtype(each.device)),
        )
        for each in tensors
    )


def _samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [_sample(tensor) for tensor in tensors if tensor.is_cpu]


def _sample(tensor: Tensor) -> Tensor:
    """A small tensor, or some numbers from all over the memory of a large one; a view of it."""
    if tensor.numel() <= _SMALL:
        return tensor
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span <= _SMALL:  # a broadcast tensor has little memory
        return tensor.as_strided((span,), (1,))
    step = (span - 1) // (_SAMPLE - 1)
    return tensor.as_strided((_SAMPLE,), (step - 1 + step % 2,))  # an odd step meets all columns


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module computes from its input and its own parameters, and nothing else."""
    return is_plain(module, nn.Linear) or is_norm(module) or (_says_so(module) and is_unhooked(module))


def _are_sharded() -> bool:
    """Whether weights may be: FSDP2 gathers new ones into the same tensors without counting a change."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _says_so(module: Any) -> bool:
    return getattr(type(module), "reads_parameters_alone", False)


def _weights(leaf: nn.Module) -> list[Tensor]:
    """What a leaf module reads, without the search that `parameters()` makes at each decoding step."""
    return [each for each in (*leaf._parameters.values(), *leaf._buffers.values()) if each is not None]
