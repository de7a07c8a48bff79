"""Which module belongs to which part of a model, and what torch.profiler says each part took."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.autograd import DeviceType

from ..._labels import ATTENTION, BLOCKS, FEED_FORWARD, GATE, INSIDE, NORM, PROJECTIONS

RESAMPLER, VISION, LANGUAGE = "resampler", "vision", "language model"
BETWEEN = "Python and autograd"  # on a cpu, the time in no operator
PARTS = (*INSIDE, RESAMPLER, VISION, LANGUAGE, BETWEEN)

_BACKWARD = "autograd::engine::evaluate_function: "
# Operators whose name says more than the module that calls them.
_OPERATORS = {
    f"flamingo_kernels::{name}_{way}": part
    for name, part in {
        "masked_cross_attention": ATTENTION,
        "gated_residual": GATE,
    }.items()
    for way in ("fwd", "bwd")
}


def labels(model: nn.Module, patterns: Mapping[str, str]) -> dict[nn.Module, str]:
    """The parts of the modules that begin one. What lies in no part is the language model's.

    Args:
        model: whatever its layers are, patched or not.
        patterns: see `Subject.parts`.
    """
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for pattern, part in patterns.items():
            if re.fullmatch(pattern, path):
                found |= _inside(module) if part == BLOCKS else {module: part}
    return found


def _inside(block: nn.Module) -> dict[nn.Module, str]:
    """The parts of a gated block, by what its modules are called.

    The rest of it is its gates, or its attention where that is no module.
    """
    attends = {"attn", "cross_attn"} & {name for name, _ in block.named_children()}
    found = {block: GATE if attends else ATTENTION}
    for path, module in block.named_modules():
        child = path.partition(".")[0]
        if "norm" in type(module).__name__.lower():
            found[module] = NORM
        elif child in ("ff", "mlp"):
            found[module] = FEED_FORWARD
        elif isinstance(module, nn.Linear):
            found[module] = PROJECTIONS
        elif child in ("attn", "cross_attn"):
            found[module] = ATTENTION
    return found


@contextmanager
def each_part(
    labels: Mapping[nn.Module, str], scope: Callable[[str], AbstractContextManager[object]]
) -> Iterator[None]:
    """Within the block every call of a labelled module runs in `scope(label)`.

    It uses no hooks, as a fused layer takes another path around modules that have some.
    """
    call = nn.Module.__call__

    def call_in_scope(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with scope(labels[module]) if module in labels else nullcontext():
            return call(module, *args, **kwargs)

    nn.Module.__call__ = call_in_scope  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def host_time(event: Any) -> float:
    """Microseconds in an event itself, what it calls left out."""
    return float(event.self_cpu_time_total)


def device_time(event: Any) -> float:
    """Microseconds of the kernels that an event itself launched."""
    return float(event.self_device_time_total)


def time_by_part(
    events: Iterable[Any], spans: Collection[str], clock: Callable[[Any], float] = host_time
) -> dict[str, list[dict[str, float]]]:
    """What the parts took, in milliseconds, in every span of each of these names.

    Args:
        events: of torch.profiler, recorded within `each_part(labels, record_function)`.
        spans: names of `record_function`s that enclose all that is asked for, one after another.
        clock: how long an event took by itself.
    """
    ordered = sorted(events, key=lambda event: event.time_range.start)
    ordered = [event for event in ordered if event.device_type == DeviceType.CPU]
    # An operator that makes an autograd node is the last to start under the node's number.
    makers = {
        (event.thread, event.sequence_nr): event
        for event in ordered
        if event.sequence_nr >= 0 and not event.fwd_thread
    }
    enclosing = [event for event in ordered if event.name in spans]
    starts = [event.time_range.start for event in enclosing]
    taken: list[dict[str, float]] = [dict.fromkeys(PARTS, 0.0) for _ in enclosing]
    for event in ordered:
        # By time: a GPU's backward pass runs on a thread of its own.
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        if place >= 0 and event.time_range.start < enclosing[place].time_range.end:
            part = BETWEEN if _is_python(event) else _part(event, makers)
            taken[place][part] += clock(event) / 1e3
    found: dict[str, list[dict[str, float]]] = {name: [] for name in spans}
    for span, each in zip(enclosing, taken, strict=True):
        found[span.name].append(each)
    return found


def _is_python(event: Any) -> bool:
    """A range, or an `autograd.Function` of this library, whose operators have events of their own."""
    return event.is_user_annotation or event.name.startswith("_")


def _part(event: Any, makers: Mapping[tuple[int, int], Any]) -> str:
    """The part that an operator ran in; for one of the backward pass, that of the operator it belongs to.

    In a gated block the innermost name counts; elsewhere the outermost, as a resampler has sublayers too.
    """
    within, around = "", LANGUAGE
    while event is not None:
        name = _OPERATORS.get(event.name, event.name)
        if name in PARTS:
            within, around = within or name, name
        if event.name.startswith(_BACKWARD):
            event = makers.get((event.fwd_thread, event.sequence_nr))
            if event is None:
                return within or BETWEEN
        else:
            event = event.cpu_parent
    return within if around in INSIDE else around
