"""fold and unfold: what is constant in inference, multiplied into the weights beside it.

A folded module is an ordinary one with other numbers: its norms have weights of 1 and biases of 0, its gates
are infinite, so that their tanh is 1, and its scores are scaled by 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ._backends.dispatch import UnsupportedError
from ._predicates import is_ordinary, is_plain
from ._report import table
from .sublayers import arguments


class Affine(NamedTuple):
    """A norm's parameters, into all layers that read it.

    `linear(weight * xhat + bias) = (linear.weight * weight) xhat + linear.weight bias`

    Args:
        norm: its path in the module.
        linears: their paths.
    """

    norm: str
    linears: tuple[str, ...]

    def fold(self, parts: _Parts) -> None:
        norm = parts.at(self.norm)
        if not any(True for _ in norm.parameters()):
            return
        if not arguments.is_norm(norm):
            raise _Kept(self.norm, f"{type(norm).__name__} is not a plain norm")
        weights = [parts.linear(path) for path in self.linears]
        scale = parts.take(f"{self.norm}.weight")
        shift = parts.take(f"{self.norm}.bias") if _has(norm, "bias") else None
        for path, weight in zip(self.linears, weights, strict=True):
            if shift is not None and shift.any():
                moved, bias = weight @ shift, parts.take(f"{path}.bias")
                parts.put(f"{path}.bias", moved if bias is None else bias + moved)
            parts.put(f"{path}.weight", weight * scale)
        parts.put(f"{self.norm}.weight", torch.ones_like(scale))
        if shift is not None:
            parts.put(f"{self.norm}.bias", torch.zeros_like(shift))


class Gate(NamedTuple):
    """A gate, into the layer before it: `tanh(gate) * linear(a)` as one product.

    Args:
        gate: the path of alpha.
        linear: that of the layer.
    """

    gate: str
    linear: str

    def fold(self, parts: _Parts) -> None:
        weight, gate = parts.linear(self.linear), parts.take(self.gate)
        dtype = _get(parts.module, self.gate).dtype
        if dtype != _get(parts.module, f"{self.linear}.weight").dtype:
            raise _Kept(self.gate, f"a gate in {dtype} may widen what it is added to")
        factor = gate.flatten().tanh()
        parts.put(f"{self.linear}.weight", weight * factor[:, None])
        if (bias := parts.take(f"{self.linear}.bias")) is not None:
            parts.put(f"{self.linear}.bias", bias * factor)
        parts.put(self.gate, torch.full_like(gate, torch.inf))


class Scale(NamedTuple):
    """The factor on the scores, into what makes the queries.

    Args:
        scale: the path of the number.
        ends: those of norms or linear layers; of these the first that is there gives the queries.
    """

    scale: str
    ends: tuple[str, ...]

    def fold(self, parts: _Parts) -> None:
        last = next(path for path in self.ends if _has(parts.module, path))
        if not arguments.is_norm(parts.at(last)):
            parts.linear(last)
        scale = parts.take(self.scale)
        for path in (f"{last}.weight", f"{last}.bias"):
            if path in parts.values or _has(parts.module, path):
                parts.put(path, parts.take(path) * scale)
        parts.put(self.scale, 1.0)


@dataclass(frozen=True)
class FoldReport:
    """What `fold` changed and what it did not; as a context manager, changes it back at the end.

    Attributes:
        folded: by the module's path in the model, its parameters and numbers that have other values.
        skipped: by path, why something was left as it is.

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
    # Weak, so that a report that outlives its model does not keep it in memory.
    _modules: tuple[ref[nn.Module], ...] = field(repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"fold: {len(self.folded)} module{'s' * (len(self.folded) != 1)} folded"]
        lines += table({path: ", ".join(names) for path, names in self.folded.items()})
        if self.skipped:
            lines += [f"{len(self.skipped)} skipped", *table(self.skipped)]
        return "\n".join(lines)

    def __enter__(self) -> FoldReport:
        return self

    def __exit__(self, *exception: Any) -> None:
        for reference in self._modules:
            if (module := reference()) is not None:
                _restore(module)


def fold(model: nn.Module, *, int8: bool = False) -> FoldReport:
    r"""Multiply the gates, norms and scales of a patched model's gated blocks into their weights. ::

        to_q(LN(x))                  scale (to_q.weight * w) xhat + scale (to_q.weight b)
        tanh(alpha) * to_out(y)      (tanh(alpha) * to_out.weight) y

        fold(model.eval())           until unfold(model)
        with fold(model.eval()): ... until the end of the block

    For inference: a vector of gates, or any gate on a GPU, then costs nothing. The original parameters are
    kept aside, which takes the memory of the folded weights once more: `unfold` gives them back to the bit,
    and `state_dict` returns them all the while. The folded ones want no gradient.

    Args:
        model: a model that `patch` has swapped modules of, in `eval()` mode.
        int8: also hold the weights that something was folded into as 8-bit integers, with a scale a row, by
            torchao. Default: no.

    Returns:
        What was folded and what was not, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is in training mode.
        UnsupportedError: nothing in the model can be folded, or int8 without torchao. It is then unchanged.
        RuntimeError: later, by `model.train()`, `load_state_dict` and `unpatch` until `unfold(model)`.

    Limits: parts with hooks, adapters, other classes or shared parameters stay as they are. Weights are
    multiplied in float32 and rounded once. int8 saves memory; on a CPU without `torch.compile` torchao makes
    every weight wide again for each product, and a step of decoding takes several times as long.

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
    quantize = _quantizer() if int8 else None
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {path: _Parts(module, uses) for path, module in model.named_modules() if _folds(module)}
    skipped = {f"{path}.{name}".strip("."): why for path, parts in found.items() for name, why in parts.run()}
    changed = {path: parts for path, parts in found.items() if parts.values}
    if not changed:
        raise UnsupportedError(
            f"fold: found nothing to fold in {type(model).__name__}; patch(model) first.",
            {path: [why] for path, why in skipped.items()},
        )
    for parts in changed.values():
        parts.apply(quantize)
    return FoldReport(
        {path: tuple(parts.values) for path, parts in changed.items()},
        skipped,
        tuple(ref(parts.module) for parts in changed.values()),
    )


def unfold(model: nn.Module) -> None:
    """Give everything that `fold` changed its value back; a model never folded stays as it is.

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
    """Into the `state_dict` of a module what its folded parameters were before."""
    for path, value in getattr(module, "folded", {}).items():
        if value is None:
            state.pop(prefix + path, None)
        elif prefix + path in state:
            state[prefix + path] = value.detach()


class _Kept(Exception):
    """Something stays as it is: its path, and why."""


class _Parts:
    """What becomes of the parameters and numbers of one module.

    Attributes:
        module: that is folded.
        values: by path, those that change, tensors in float32 or wider.
    """

    def __init__(self, module: Any, uses: Counter[int]) -> None:
        self.module = module
        self.values: dict[str, Any] = {}
        self._uses = uses

    def run(self) -> Iterator[tuple[str, str]]:
        """Find the values; of what must stay, the path and why."""
        if is_folded(self.module):
            yield "", "folded already"
            return
        for each in _folds(self.module):
            try:
                each.fold(self)
            except _Kept as kept:
                yield kept.args

    def at(self, path: str) -> Any:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise _Kept(path, "is not there") from None

    def linear(self, path: str) -> Tensor:
        """The weight of a plain linear layer."""
        linear = self.at(path)
        if not is_plain(linear, nn.Linear) or not is_ordinary(linear.weight):
            raise _Kept(path, f"{type(linear).__name__} is not a plain linear layer")
        return self.take(f"{path}.weight")

    def take(self, path: str) -> Any:
        """A parameter or number as it is by now."""
        value = self.values[path] if path in self.values else _get(self.module, path)
        if not isinstance(value, Tensor):
            return value
        if path not in self.values and self._uses[id(value)] > 1:
            raise _Kept(path, "the parameter is shared")
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def put(self, path: str, value: Any) -> None:
        self.values[path] = value

    def apply(self, quantize: Callable[[nn.Module], None] | None) -> None:
        """Change the module, which keeps what was before."""
        before = {path: _get(self.module, path) for path in self.values}
        dtypes = {path: value.dtype for path, value in before.items() if isinstance(value, Tensor)}
        for path, value in self.values.items():
            if isinstance(value, Tensor):
                linear = path.rpartition(".")[0]
                dtype = dtypes.get(path) or dtypes[f"{linear}.weight"]  # of a bias that was none
                value = nn.Parameter(value.to(dtype), requires_grad=False)
            _set(self.module, path, value)
        self.module.folded = before
        for linear in {path.rpartition(".")[0] for path in before if path.endswith(".weight")}:
            if quantize and isinstance(self.module.get_submodule(linear), nn.Linear):
                quantize(self.module.get_submodule(linear))


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
    """Give a module what it had before, where its parameters are now."""
    for path, value in vars(module).pop("folded", {}).items():
        now = _get(module, path)
        if isinstance(value, Tensor) and (now.device, now.dtype) != (value.device, value.dtype):
            value = nn.Parameter(value.detach().to(now), value.requires_grad)
        _set(module, path, value)


def _quantizer() -> Callable[[nn.Module], None]:
    """What turns the weight of a linear layer into int8."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UnsupportedError(
            f"fold: int8=True needs torchao, which cannot be imported ({error}); pip install torchao.",
            {"int8": [str(error)]},
        ) from error
    return lambda linear: quantize_(nn.Sequential(linear), Int8WeightOnlyConfig())
