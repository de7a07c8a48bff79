"""One call of a class and of the fused one, and what differs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..samples import Call
from .apart import drawn, set_seed
from .rounds import Disagreement, Round


def agrees(original: nn.Module, fused: nn.Module, call: Call, how: Round) -> bool:
    """Whether a call could be compared. Raises Disagreement where the results differ."""
    if not how.makes(call):
        return False
    try:
        expected = _run(original, call, how)
    except Exception:
        return False  # nobody relies on a call that the original refuses
    if call.shape and [each.shape for each in expected.outputs] != [call.shape]:
        return False
    try:
        got = _run(fused, call, how)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Disagreement(
            f'the call "{call.title}" is one that the fused class refuses ({reason})'
        ) from error
    if differs := _differs(got, expected, how.tolerance):
        raise Disagreement(f'in the call "{call.title}" of a trial {how}, {differs}')
    return True


class _Result(NamedTuple):
    """What a call has done.

    Attributes:
        form: of its result: all that is no number.
        outputs: the tensors of the result.
        gradients: of inputs and weights.
        drawn: the state of the random numbers after it.
        written: the inputs that it has changed, by number.
    """

    form: list[str]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    drawn: tuple[Any, ...]
    written: list[int]


def _run(module: nn.Module, call: Call, how: Round) -> _Result:
    """One call with its gradients."""
    set_seed(how.seed)
    arguments, options = call.make(how.dtype)
    inputs = _flat((arguments, options))
    before = [each.detach().clone() for each in inputs]
    set_seed(0)
    with (
        torch.set_grad_enabled(how.with_gradients),
        torch.autocast("cpu", torch.bfloat16, enabled=how.autocast),
    ):
        result = module(*arguments, **options)
    state = drawn()
    written = [i for i, each in enumerate(inputs) if not torch.equal(each, before[i])]
    outputs = _flat(result)
    leaves = {f"input {i}": each for i, each in enumerate(inputs) if each.requires_grad}
    leaves |= {f"weight {name}": each for name, each in module.named_parameters() if each.requires_grad}
    gradients = _gradients(outputs, leaves, how)
    return _Result(_form(result), [each.detach() for each in outputs], gradients, state, written)


def _gradients(outputs: list[Tensor], leaves: dict[str, Tensor], how: Round) -> dict[str, Tensor]:
    """The gradients of a random sum of outputs."""
    torch.default_generator.manual_seed(how.seed)
    terms = [(out * torch.randn_like(out)).sum() for out in outputs if out.requires_grad]
    if not terms:
        return {}
    total = functools.reduce(torch.add, terms)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _flat(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _form(value: Any) -> list[str]:
    """A result without its numbers, in words."""
    leaves, spec = pytree.tree_flatten(value)
    return [str(spec), *map(_leaf_form, leaves)]


def _leaf_form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{leaf.dtype} {tuple(leaf.shape)}{'' if leaf.requires_grad else ' without gradient'}"


def _differs(got: _Result, expected: _Result, tolerance: float) -> str:
    """The first difference between two results in words; empty if there is none."""
    if got.form != expected.form:
        forms = (", ".join(each.form[1:]) for each in (expected, got))
        return "the result is {}, and by the fused class {}".format(*forms)
    if got.drawn != expected.drawn:
        return "it draws random numbers"
    if got.written != expected.written:
        return "it writes into its inputs"
    pairs = [("the result", *pair) for pair in zip(got.outputs, expected.outputs, strict=True)]
    pairs += [
        (f"the gradient of {name}", got.gradients[name], grad) for name, grad in expected.gradients.items()
    ]
    for name, a, b in pairs:
        a, b = a.double(), b.double()
        bound = tolerance * (b.abs().nan_to_num().max().item() if b.numel() else 0)
        if not torch.allclose(a, b, rtol=0, atol=bound + 1e-9, equal_nan=True):
            return f"{name} differs by {(a - b).abs().max().item():.2g}"
    return ""
