"""fold and unfold: factors that are constant in inference, multiplied into the weights beside them.

A folded module is an ordinary one with other numbers: its norms have weights of 1 and biases of 0, its gates
are infinite, so that their tanh is 1, and its scores are scaled by 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ._backends.dispatch import UnsupportedError
from ._predicates import is_ordinary, is_plain
from ._report import Listing, Report
from .sublayers import arguments


class Affine(NamedTuple):
    """Folds a norm's parameters into all layers that read it.

    `linear(weight * xhat + bias) = (linear.weight * weight) xhat + linear.weight bias`

    Args:
        norm: the path of the norm in the module.
        linears: the paths of the layers.
    """

    norm: str
    linears: tuple[str, ...]

    def fold(self, folding: _Folding) -> None:
        norm = folding.at(self.norm)
        if not any(True for _ in norm.parameters()):
            return
        if not arguments.is_norm(norm):
            raise _Unfoldable(self.norm, f"{type(norm).__name__} is not a plain norm")
        weights = [folding.linear(path) for path in self.linears]
        scale = folding.take(f"{self.norm}.weight")
        shift = folding.take(f"{self.norm}.bias") if _has(norm, "bias") else None
        for path, weight in zip(self.linears, weights, strict=True):
            if shift is not None and shift.any():
                moved, bias = weight @ shift, folding.take(f"{path}.bias")
                folding.put(f"{path}.bias", moved if bias is None else bias + moved)
            folding.put(f"{path}.weight", weight * scale)
        folding.put(f"{self.norm}.weight", torch.ones_like(scale))
        if shift is not None:
            folding.put(f"{self.norm}.bias", torch.zeros_like(shift))


class Gate(NamedTuple):
    """Folds a gate into the layer before it: `tanh(gate) * linear(a)` as one product.

    Args:
        gate: the path of alpha.
        linear: the path of the layer.
    """

    gate: str
    linear: str

    def fold(self, folding: _Folding) -> None:
        weight, gate = folding.linear(self.linear), folding.take(self.gate)
        dtype = _get(folding.module, self.gate).dtype
        if dtype != _get(folding.module, f"{self.linear}.weight").dtype:
            raise _Unfoldable(self.gate, f"a gate in {dtype} may widen what it is added to")
        factor = gate.flatten().tanh()
        folding.put(f"{self.linear}.weight", weight * factor[:, None])
        if (bias := folding.take(f"{self.linear}.bias")) is not None:
            folding.put(f"{self.linear}.bias", bias * factor)
        folding.put(self.gate, torch.full_like(gate, torch.inf))


class Scale(NamedTuple):
    """Folds the factor on the scores into the module that gives the queries.

    Args:
        scale: the path of the number.
        ends: paths of norms or linear layers; the first that exists gives the queries.
    """

    scale: str
    ends: tuple[str, ...]

    def fold(self, folding: _Folding) -> None:
        last = next(path for path in self.ends if _has(folding.module, path))
        if not arguments.is_norm(folding.at(last)):
            folding.linear(last)
        scale = folding.take(self.scale)
        for path in (f"{last}.weight", f"{last}.bias"):
            if path in folding.values or _has(folding.module, path):
                folding.put(path, folding.take(path) * scale)
        folding.put(self.scale, 1.0)


@dataclass(frozen=True, repr=False)
class FoldReport(Report):
    """What `fold` changed and what it did not; as a context manager, it unfolds the model at the end.

    Attributes:
        folded: the parameters and numbers with new values, by the module's path in the model.
        skipped: by path, why a parameter or number was left as it is.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> from flamingo_kernels import fold, patch
        >>> attn = MaskedCrossAttention(dim=8, dim_visual=8).eval()
        >>> _ = patch(attn)
        >>> fold(attn).folded
        {'': ('to_q.weight', 'norm.weight', 'norm.bias', 'scale')}
    """

    folded: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]

    def _listing(self) -> Listing:
        title = f"fold: {len(self.folded)} module{'s' * (len(self.folded) != 1)} folded"
        return Listing(title, {path: ", ".join(names) for path, names in self.folded.items()}, self.skipped)

    def _undo(self, modules: Iterator[nn.Module]) -> None:
        for module in modules:
            _restore(module)


def fold(model: nn.Module) -> FoldReport:
    r"""Multiply the gates, norms and scales of a patched model's gated blocks into their weights. ::

        to_q(LN(x))                  scale (to_q.weight * w) xhat + scale (to_q.weight b)
        tanh(alpha) * to_out(y)      (tanh(alpha) * to_out.weight) y

        fold(model.eval())           until unfold(model)
        with fold(model.eval()): ... until the end of the block

    For inference: a vector of gates, or any gate on a GPU, then costs nothing. The original parameters are
    kept aside, which takes the memory of the folded weights once more: `unfold` restores them to the bit, and
    `state_dict` returns them all the while. The folded parameters need no gradient.

    Args:
        model: a model that `patch` has swapped modules of, in `eval()` mode.

    Returns:
        What was folded and what was not, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is in training mode.
        UnsupportedError: nothing in the model can be folded. It is then unchanged.
        RuntimeError: later, by `model.train()`, `load_state_dict` and `unpatch` until `unfold(model)`.

    Limits: parts with hooks, adapters, other classes or shared parameters stay as they are. Weights are
    multiplied in float32 and rounded once. To make integers of them: `quantize` afterwards.

    Source: Flamingo (arXiv 2204.14198), section 2.2, for the gates.

    Example:
        >>> from flamingo import GatedCrossAttentionBlock
        >>> from flamingo_kernels import patch
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8).eval()
        >>> _ = patch(block)
        >>> print(fold(block))
        fold: 2 modules folded
          (model)  1  attn.to_out.weight, attn_gate, ff.1.weight, ff.0.weight, ff.0.bias, ff.3.weight, ff_gate
          attn     1  to_q.weight, norm.weight, norm.bias, scale
        >>> unfold(block)
        >>> block.attn_gate.item()
        0.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: expected a torch.nn.Module, got {type(model).__name__}.")
    if model.training:
        raise ValueError("fold: expected a model for inference, got one in training mode; call model.eval().")
    paths = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    uses = Counter(id(each) for _, each in paths)
    found = {path: _Folding(module, uses) for path, module in model.named_modules() if _folds(module)}
    skipped = {
        f"{path}.{name}".strip("."): why for path, folding in found.items() for name, why in folding.run()
    }
    changed = {path: folding for path, folding in found.items() if folding.values}
    if not changed:
        raise UnsupportedError(
            f"fold: found nothing to fold in {type(model).__name__}; patch(model) first.",
            {path: [why] for path, why in skipped.items()},
        )
    for folding in changed.values():
        folding.apply()
    return FoldReport(
        {path: tuple(folding.values) for path, folding in changed.items()},
        skipped,
        _modules=tuple(ref(folding.module) for folding in changed.values()),
    )


def unfold(model: nn.Module) -> None:
    """Restore everything that `fold` has changed; a model that was never folded stays as it is.

    Args:
        model: a model, or a part or copy of one.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> from flamingo_kernels import patch
        >>> attn = MaskedCrossAttention(dim=8, dim_visual=8).eval()
        >>> _ = patch(attn), fold(attn)
        >>> unfold(attn)
        >>> attn.scale
        0.125
    """
    for module in model.modules():
        _restore(module)


def is_folded(module: nn.Module) -> bool:
    return bool(getattr(module, "folded", ()))


def put_originals(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Replace a module's folded parameters in its `state_dict` by the originals."""
    for path, value in getattr(module, "folded", {}).items():
        if value is None:
            state.pop(prefix + path, None)
        elif prefix + path in state:
            state[prefix + path] = value.detach()


class _Unfoldable(Exception):
    """A parameter or number that must stay as it is: its path, and why."""


class _Folding:
    """The new values of one module's parameters and numbers, found first and applied later.

    Attributes:
        module: the module.
        values: new values by path, tensors in float32 or wider.
    """

    def __init__(self, module: Any, uses: Counter[int]) -> None:
        self.module = module
        self.values: dict[str, Any] = {}
        self._uses = uses

    def run(self) -> Iterator[tuple[str, str]]:
        """Find the new values; yields the path and the reason of everything that must stay."""
        if is_folded(self.module):
            yield "", "folded already"
            return
        for each in _folds(self.module):
            try:
                each.fold(self)
            except _Unfoldable as reason:
                yield reason.args

    def at(self, path: str) -> Any:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise _Unfoldable(path, "is not there") from None

    def linear(self, path: str) -> Tensor:
        """The weight of a plain linear layer."""
        linear = self.at(path)
        if not is_plain(linear, nn.Linear) or not is_ordinary(linear.weight):
            raise _Unfoldable(path, f"{type(linear).__name__} is not a plain linear layer")
        return self.take(f"{path}.weight")

    def take(self, path: str) -> Any:
        """A parameter or number, with what was folded into it so far."""
        value = self.values[path] if path in self.values else _get(self.module, path)
        if not isinstance(value, Tensor):
            return value
        if path not in self.values and self._uses[id(value)] > self._uses[id(self.module)]:
            raise _Unfoldable(path, "the parameter is shared")
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def put(self, path: str, value: Any) -> None:
        self.values[path] = value

    def apply(self) -> None:
        """Give the module its new values; it keeps the old ones as `folded`."""
        before = {path: _get(self.module, path) for path in self.values}
        dtypes = {path: value.dtype for path, value in before.items() if isinstance(value, Tensor)}
        for path, value in self.values.items():
            if isinstance(value, Tensor):
                linear = path.rpartition(".")[0]
                dtype = dtypes.get(path) or dtypes[f"{linear}.weight"]  # a bias that was None
                value = nn.Parameter(value.to(dtype), requires_grad=False)
            _set(self.module, path, value)
        self.module.folded = before


def _folds(module: Any) -> tuple[Affine | Gate | Scale, ...]:
    return getattr(module, "folds", ())


def _get(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _has(module: nn.Module, path: str) -> bool:
    try:
        return _get(module, path) is not None
    except AttributeError:
        return False


def _set(module: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def _restore(module: nn.Module) -> None:
    """Give a module its original values, on the device and in the dtype of the folded ones."""
    for path, value in vars(module).pop("folded", {}).items():
        now = _get(module, path)
        if isinstance(value, Tensor) and (now.device, now.dtype) != (value.device, value.dtype):
            value = nn.Parameter(value.detach().to(now), value.requires_grad)
        _set(module, path, value)
