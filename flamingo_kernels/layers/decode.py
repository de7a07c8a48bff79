"""One token through a gated block by `gated_block_decode`, if its kernels can compute the whole block.

A step of a small model takes no longer than to find out what its modules are. So that is asked once, and kept
with what would change the answer.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._backends import dispatch
from .._kept import STEPS, Snapshot, counts_changes
from .._predicates import autocast_dtype, is_eager, is_unhooked
from ..mask import MediaMask
from ..ops import GatedBlockWeights
from ..ops.gated_block_decode import api
from ..ops.linear import config
from ..ops.linear.products import FEW_ROWS
from ..sublayers.arguments import as_activation, as_norm, as_weight, has_integers

_NAME = "gated_block_decode"


class Parts(NamedTuple):
    """The modules and gates of a block; see `GatedBlockWeights`, which has their parameters."""

    norm: nn.Module
    to_q: nn.Module
    to_out: nn.Module
    ff_norm: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    gate: Tensor | None
    ff_gate: Tensor | None
    q_norm: nn.Module | None = None
    gate_proj: nn.Module | None = None


def may_decode(layer: nn.Module, x: Tensor) -> bool:
    """Whether x `[B, T, D]` is one token a text, without gradients; any other text ends the last step."""
    may = x.shape[1] == 1 and x.numel() > 0 and not torch.is_grad_enabled()
    if not may and is_eager(x):
        STEPS.pop(layer, None)  # its copies of weights are a part of the model's size
    return may


def step_of(layer: nn.Module, parts: Parts, x: Tensor) -> Step | None:
    """A block as the operator takes it, kept for the next token; None where it does not compute just that."""
    if not is_eager(x):
        return None if autocast_dtype(x.device) else _make(parts, x)
    step: Step | None = STEPS.get(layer)
    if step is None or not step.holds(parts, x):
        STEPS.pop(layer, None)  # before the next one is made, as two would need twice the memory
        step = _make(parts, x)
        STEPS[layer] = step
    return step


class Step:
    """The weights of a block as the operator takes them, while the block is what it was.

    Under torch.autocast they are copies in its dtype. torch's own cache has copies of trainable weights
    alone, and loses them where the context ends.
    """

    def __init__(self, parts: Parts, given: GatedBlockWeights, x: Tensor) -> None:
        self._parts, self._seen = parts, [_Seen.of(part) for part in parts if isinstance(part, nn.Module)]
        self._given, taken = list(given.by_name().values()), given.autocast()
        self._layouts = self._read_layouts()
        self._products = autocast_dtype(x.device)
        self._tensors, self._options = taken.tensors(), taken.options()
        self._dtype = _dtype_of(taken)
        pairs = zip(self._given, taken.by_name().values(), strict=True)
        self._originals = [before for before, now in pairs if now is not before]
        self._snapshot = Snapshot(self._originals)

    def holds(self, parts: Parts, x: Tensor) -> bool:
        """Whether these are the same parts, with nothing changed but the numbers in their memory."""
        same = all(map(operator.is_, parts, self._parts)) and all(seen.is_same() for seen in self._seen)
        same = same and self._products == autocast_dtype(x.device) and self._read_layouts() == self._layouts
        return same and self._snapshot.is_of(self._originals)

    def _read_layouts(self) -> list[Any]:
        return [(tensor.data_ptr(), tensor.dtype, tensor.stride()) for tensor in self._given]

    def run(self, x: Tensor, k: Tensor, v: Tensor, mask: MediaMask, scale: float) -> Tensor | None:
        """The block for x `[B, 1, D]` and the media of B sequences or fewer; None where no kernel can."""
        batch, sequences = x.shape[0], k.shape[0]
        if k.dtype != (self._dtype or k.dtype) or sequences == 0 or batch % sequences:
            return None
        backend = dispatch.choice(_NAME, x, k, v)
        if backend in ("", "reference") or (backend == "cpu" and not self._pays(batch)):
            return None
        return api.run(backend, x[:, 0], k, v, mask, self._tensors, self._options, scale)[:, None]

    def _pays(self, rows: int) -> bool:
        """Whether the products of a processor's kernels are fast for so many rows."""
        of_integers = self._dtype is None
        return of_integers or rows <= FEW_ROWS or config.choose("forward", self._dtype, rows) == "cpu"


class _Seen(NamedTuple):
    """A module, as it was when its parameters were taken."""

    module: nn.Module
    cls: type[nn.Module]
    tensors: tuple[Tensor | None, ...]
    settings: tuple[Any, ...]

    @staticmethod
    def of(module: nn.Module) -> _Seen:
        return _Seen(module, type(module), _tensors_of(module), _settings_of(module))

    def is_same(self) -> bool:
        module = self.module
        unchanged = type(module) is self.cls and is_unhooked(module) and _settings_of(module) == self.settings
        return unchanged and all(map(operator.is_, _tensors_of(module), self.tensors))


def _tensors_of(module: Any) -> tuple[Tensor | None, ...]:
    if has_integers(module):
        return (*module.integer_weight(), module.bias)
    return tuple(module._parameters.values())


def _settings_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple(map(vars(module).get, ("eps", "variance_epsilon", "approximate", "act")))


def _make(parts: Parts, x: Tensor) -> Step | None:
    norms = {name: getattr(parts, name) for name in ("norm", "ff_norm", "q_norm")}
    linears = {name: getattr(parts, name) for name in ("to_q", "to_out", "up", "down", "gate_proj")}
    found: dict[str, Any] = {"gate": parts.gate, "ff_gate": parts.ff_gate}
    found |= {name: as_norm(module, x) for name, module in norms.items()}
    found |= {name: as_weight(module, x) for name, module in linears.items()}
    found["activation"] = as_activation(parts.activation)
    if any(found[name] is None for name in Parts._fields if getattr(parts, name) is not None):
        return None
    weights = GatedBlockWeights(**found)
    tensors = weights.by_name().values()
    fit = all(tensor.is_contiguous() and tensor.device == x.device for tensor in tensors)
    known = all(tensor.dtype in (*dispatch.KERNEL_DTYPES, torch.int8) for tensor in tensors)
    gates_fit = all(gate.numel() in (1, x.shape[-1]) for gate in weights.gates().values())
    return Step(parts, weights, x) if fit and known and gates_fit and _may_cast(weights, x) else None


def _may_cast(weights: GatedBlockWeights, x: Tensor) -> bool:
    """Whether products are in the dtype of x, or in that of autocast, of which a copy may be kept."""
    if autocast_dtype(x.device) is None:
        return _dtype_of(weights) in (None, x.dtype)
    return x.dtype in dispatch.KERNEL_DTYPES and all(map(counts_changes, weights.by_name().values()))


def _dtype_of(weights: GatedBlockWeights) -> torch.dtype | None:
    """The dtype of the matrices; None where all are integers."""
    return next((each.weight.dtype for each in weights.linears().values() if each.scale is None), None)
