"""Shapes, bytes and FLOPs of a model that does not fit into memory, counted on tensors without numbers.

The model is built and run under torch's FakeTensorMode: shapes, dtypes and devices without numbers, and what
is saved for the backward pass is what would be saved on that device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..measure.memory import available, saved_bytes
from ..measure.swapped import swapped
from ..measure.text import dtype_name, gibibytes
from . import report
from .exact import bytes_needed
from .parts import LANGUAGE, PARTS, each_part, labels
from .run import call, twin
from .sides import BEFORE, PATCHED
from .subject import PREFILL, STEP, Plan

# The FLOP counter knows this attention on a GPU only.
_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: (
        sdpa_backward_flop_count(dout, q, k, v)
    ),
}


@dataclass(frozen=True, repr=False)
class Counted:
    """What can be known of a model without running it; nothing here was measured.

    Attributes:
        lacking: why it was not run.
        parameters: by part.
        bytes_each: of one parameter.
        prefill_flops: by part, of the model as it is written, dense masks and all.
        flops: by kind of work, backward pass included.
        saved: bytes kept for the backward pass, before and after the patch; its linear layers keep the same.
    """

    model: str
    dtype: str
    inputs: dict[str, list[int]]
    lacking: str
    parameters: dict[str, int]
    bytes_each: int
    prefill_flops: dict[str, int]
    flops: dict[str, int]
    saved: dict[str, int]

    def __str__(self) -> str:
        return report.counted(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report.html_of_counted(self)


def lacking_memory(plan: Plan, dtype: torch.dtype, device: str, *, by_block: bool = False) -> str:
    """Why a model cannot be run here, or an empty string.

    The comparison in float64 takes most: see `bytes_needed`.
    """
    with nullcontext() if plan.needs_memory else FakeTensorMode():
        model = plan.subject(dtype, device).model
    needed = bytes_needed(model, by_block=by_block)
    there = available(device)
    if there is None or needed <= there:
        return ""
    return f"needs {gibibytes(needed)} to be compared in float64, {gibibytes(there)} are free"


def run(plan: Plan, dtype: torch.dtype, device: str, lacking: str) -> Counted:
    """Count instead of measuring."""
    with FakeTensorMode():
        subject = plan.subject(dtype, device)
        after = twin(subject.model)
        swapped(after)
        of_module = labels(subject.model, subject.parts)
        # With gradients, as the FLOP counter cannot do without; they change nothing about a forward pass.
        starts = {name: work.start for name, work in subject.works.items()}
        calls: dict[str, Callable[[], object]] = {
            name: start(subject.model) for name, start in starts.items()
        }
        calls[STEP] = call(STEP, subject.works[STEP], subject.model)
        return Counted(
            plan.name,
            dtype_name(dtype),
            {name: list(each.shape) for name, each in subject.inputs.items()},
            lacking,
            _in_order(parameters_by_part(subject.model, of_module)),
            dtype.itemsize,
            _in_order(flops_by_part(calls[PREFILL], of_module)),
            {name: sum(flops_by_part(each, {}).values()) for name, each in calls.items()},
            {
                side: saved_bytes(starts[STEP](model), model)
                for side, model in ((BEFORE, subject.model), (PATCHED, after))
            },
        )


def parameters_by_part(model: nn.Module, of_module: Mapping[nn.Module, str]) -> Counter[str]:
    """How many parameters every part has; one that stands in several places counts in the first."""
    part_of: dict[nn.Parameter, str] = {}

    def visit(module: nn.Module, part: str) -> None:
        part = of_module.get(module, part)
        for parameter in module.parameters(recurse=False):
            part_of.setdefault(parameter, part)
        for child in module.children():
            visit(child, part)

    visit(model, LANGUAGE)
    counts: Counter[str] = Counter()
    for parameter, part in part_of.items():
        counts[part] += parameter.numel()
    return counts


def flops_by_part(call: Callable[[], object], of_module: Mapping[nn.Module, str]) -> Counter[str]:
    """The FLOPs of a call's matrix products; those of a backward pass count for the outermost part."""
    counts: Counter[str] = Counter()
    around = [LANGUAGE]
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:

        def charge() -> None:
            counts[around[-1]] += counter.get_total_flops() - counts.total()

        @contextmanager
        def scope(part: str) -> Iterator[None]:
            charge()
            around.append(part)
            yield
            charge()
            around.pop()

        with each_part(of_module, scope):
            call()
        charge()
    return counts


def _in_order(counts: Counter[str]) -> dict[str, int]:
    return {part: counts[part] for part in PARTS if counts[part]}
