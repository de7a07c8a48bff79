"""The small instance of the user's class that is tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._anatomy import contents, measure
from ..registry import Match, targets
from .rounds import Disagreement, Round

_SOFTMAX_SCALES = ("scale", "scaling", "qk_scale")
_PLACE = "layer_idx"  # where a layer stands in its model
OWN = frozenset(vars(nn.Module()))  # what every module has
PLAIN = (bool, int, float, str, type(None))


def make_small(module: nn.Module, known: Match, build: Callable[[], nn.Module]) -> nn.Module:
    """A new small module of the user's class, with the flags and parts of the user's module."""
    try:
        small = build()
        shared = {*map(id, _tensors(small))} & {*map(id, _tensors(module))}
        small = copy.deepcopy(small)
    except Exception as error:
        raise Disagreement(
            f"no small one can be made for a trial ({type(error).__name__}: {error})"
        ) from error
    if type(small) is not type(module):
        raise Disagreement(f"the one made for a trial is a {type(small).__name__}")
    if shared:
        raise Disagreement("a new one shares weights with the others")
    if reason := _other_parts(small, module, known):
        raise Disagreement(f"a new one has other parts: {reason}")
    _copy_values(small, module, known)
    return small


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _other_parts(small: nn.Module, module: nn.Module, known: Match) -> str:
    """The first part in which a small module and the user's differ by more than sizes."""
    if reason := measure(small, known.fused.anatomy)[1]:
        return reason
    if differ := {*contents(small)} ^ {*contents(module)}:
        return min(differ)
    for path, ours, theirs in _in_both(small.named_modules(), module.named_modules()):
        if is_torchs(ours) and is_torchs(theirs):
            if type(ours) is not type(theirs):
                return f"{path} is of class {type(ours).__name__}, not {type(theirs).__name__}"
            if not ours._modules and (differ := {*ours.state_dict()} ^ {*theirs.state_dict()}):
                return f"{path}.{min(differ)}"
    return ""


def is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _copy_values(small: nn.Module, module: nn.Module, known: Match) -> None:
    """Give a small module the values of the user's that are no sizes."""
    sizes = sizes_of(small, module)
    small_d, users_d = (measure(each, known.fused.anatomy)[0].get("d", 1) for each in (small, module))
    for _, ours, theirs in _in_both(small.named_modules(), module.named_modules()):
        for name, value in _values(theirs) if type(ours) is type(theirs) else ():
            if name in _SOFTMAX_SCALES and isinstance(value, float):
                setattr(ours, name, value * (users_d / small_d) ** 0.5)
            elif (getattr(ours, name, None), value) not in sizes:
                setattr(ours, name, value)


def sizes_of(small: nn.Module, module: nn.Module) -> set[tuple[Any, Any]]:
    """The sizes of a small module and of its parts, each with that of the user's."""
    sizes: set[tuple[Any, Any]] = set()
    for _, ours, theirs in _in_both(small.named_parameters(), module.named_parameters()):
        sizes |= {*zip(ours.shape, theirs.shape, strict=False)}
    for _, ours, theirs in _in_both(small.named_modules(), module.named_modules()):
        sizes.add((len(ours._modules), len(theirs._modules)))
        sizes |= {*_letters(ours, theirs)}
    return sizes


def _letters(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[int, int]]:
    """The sizes of two modules by every anatomy that fits both."""
    for fused, _ in targets().values():
        (small, wrong), (users, other) = (measure(each, fused.anatomy) for each in (ours, theirs))
        if not (wrong or other):
            yield from ((small[letter], users[letter]) for letter in small.keys() & users.keys())


def _in_both(ours: Iterator[Any], theirs: Iterator[Any]) -> Iterator[tuple[str, Any, Any]]:
    """What two modules have at the same paths."""
    others = dict(theirs)
    yield from ((path, each, others[path]) for path, each in ours if path in others)


def values_of(module: nn.Module) -> frozenset[tuple[str, str, Any]]:
    """The plain values of a module and its parts, which may choose what its forward computes."""
    return frozenset(
        (path, name, value) for path, part in module.named_modules() for name, value in _values(part)
    )


def _values(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(part).items():
        if isinstance(value, PLAIN) and name not in OWN and name != _PLACE:
            yield name, value


def randomised(module: nn.Module, how: Round) -> nn.Module:
    """Random weights, gates and output projections too: at zero they would hide what differs."""
    torch.default_generator.manual_seed(how.seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point():
                weight.normal_(std=how.spread * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5))
    return module
