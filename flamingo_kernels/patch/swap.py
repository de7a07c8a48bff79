"""Changes the class of a module and changes it back; everything else about the module stays.

The new class derives from the old one, so `isinstance` still holds, while `type(module) is` does not. The
module remembers its old class, also through `copy.deepcopy` and `pickle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from .cache_keyword import with_cache_keyword

_ORIGINAL = "_unpatched_class"
_FIXES = "fixes"


def swap(module: nn.Module, fused: type[nn.Module], fixes: frozenset[str] = frozenset()) -> None:
    """Give a module the fused class that replaces its own."""
    original = type(module)
    _forget_own_forward(module)
    setattr(module, _ORIGINAL, original)
    module.__class__ = fused_class(original, fused)
    if fixes:
        setattr(module, _FIXES, fixes)


def is_swapped(module: nn.Module) -> bool:
    return _ORIGINAL in vars(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was swapped, or else its class."""
    return cast(type[nn.Module], vars(module).get(_ORIGINAL, type(module)))


def restore(modules: Iterable[nn.Module]) -> None:
    """Restore the original class of every swapped module among these."""
    swapped = [module for module in modules if is_swapped(module)]
    for module in swapped:
        if getattr(module, "folded", ()):
            raise RuntimeError("unpatch: expected a model that is not folded; unfold(model) first.")
        if type(module) not in _given:
            raise RuntimeError(
                f"unpatch: expected a {vars(module)[_ORIGINAL].__qualname__} with the class that patch gave "
                f"it, got {type(module).__qualname__}; undo first what changed its class since."
            )
    for module in swapped:
        _forget_own_forward(module)
        module.__class__ = vars(module).pop(_ORIGINAL)
        vars(module).pop(_FIXES, None)


def has_other_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not the one of its class."""
    return "forward" in vars(module) and not _own_forward(module)


def _own_forward(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) is type(module).forward


def _forget_own_forward(module: nn.Module) -> None:
    """Delete the class's forward from the instance, where transformers 4 leaves it after recording outputs.

    It would hide the forward of the new class.
    """
    if _own_forward(module):
        del module.forward


def fused_class(original: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    """`original` with the forward of `fused`: the same class at every call, so compiled code stays valid."""
    if (original, fused) not in _classes:
        _classes[original, fused] = fused if issubclass(fused, original) else _combine(original, fused)
        _given.add(_classes[original, fused])
    return _classes[original, fused]


def _combine(original: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    members = {"__module__": fused.__module__, "_fused": fused, **with_cache_keyword(fused, original)}
    return type(fused.__name__, (_Combined, fused, original), members)


_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_given: set[type[nn.Module]] = set()  # all classes that modules were given


class _Combined(nn.Module):
    """Copies and pickles modules of combined classes by their original class, as no import finds these."""

    _fused: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]
        return (_rebuild, (vars(self)[_ORIGINAL], self._fused), *state)


def _rebuild(original: type[nn.Module], fused: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(fused_class(original, fused))
