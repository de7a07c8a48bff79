"""patch and unpatch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import nn

from .._anatomy import misfit
from .._backends.dispatch import UnsupportedError
from .known import KNOWN, full_name, why_unknown
from .registry import Match, families, match, supported
from .report import PatchReport
from .source import unwrapped
from .swap import fused_class, has_other_forward, is_swapped, restore, swap


def patch(model: nn.Module, *, fixes: Iterable[str] = ()) -> PatchReport:
    """Swap the cross-attention and resampler modules of a model for fast ones that compute the same.

    Each module found keeps its identity, parameters, hooks and place, and gets a subclass of its class with
    another forward. So optimizers, `state_dict` and all references to it stay valid, and `isinstance` still
    holds. The media mask follows the policy that the model had. ::

        patch(model)                   until unpatch(model)
        with patch(model): ...         until the end of the block

    The fused modules compute what the originals do, known bugs included, except those named in `fixes`:

    ============= ============================================================================================
    uniform_rows  open-flamingo, flamingo-pytorch: text whose image was not passed averages all images
    row_leak      Mllama: text before the first image attends to every image and its padding
    causal        Mllama under "sdpa": without a mask, row t sees no vision token after t
    ============= ============================================================================================

    Names are not enough: a module is swapped only if the source of its forward, with everything that it
    calls, belongs to a known version, and if it is made of the parts that this version has. Other releases,
    forks, replaced functions and modules with further parts are left alone, and the report says why. The
    original's forward calls parts with hooks, and all parts while there are global hooks on modules.

    A model patched again stays as it is. Patch before `torch.jit.script` and before FSDP2's `fully_shard`,
    whose wrapped classes cannot be taken back; modules inside FSDP1 and `torch.compile` wrappers are found.

    Args:
        model: a model, or a single module, of `flamingo`, open-flamingo, flamingo-pytorch or transformers
            (Idefics, Mllama, Idefics2's and Evolla's resamplers, Evolla's aligner); versions: see the README.
            Subclasses of their classes are swapped too, unless they override what would be replaced.
        fixes: names from the table above, for bugs that the model has. Default: none.

    Returns:
        What was swapped and what was not, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module, or `fixes` is a string.
        ValueError: a fix that is unknown, that belongs to other models, or that comes after the modules were
            patched without it. The model is then unchanged.
        UnsupportedError: nothing in the model is known. It is then unchanged.

    Source: Flamingo (arXiv 2204.14198), section 2.

    Example:
        >>> from flamingo import GatedCrossAttentionBlock
        >>> block = GatedCrossAttentionBlock(dim=16, dim_visual=8)
        >>> print(patch(block))
        patch: 2 modules replaced, mask policy "zero"
          (model)  1  flamingo.modules.GatedCrossAttentionBlock
          attn     1  flamingo.modules.MaskedCrossAttention
        >>> unpatch(block)
        >>> type(block) is GatedCrossAttentionBlock
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a torch.nn.Module, got {type(model).__name__}.")
    wanted = _known_fixes(fixes)
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    namesakes: dict[str, str] = {}
    unknown = cache(why_unknown)  # a model has many modules of a class
    for path, module in model.named_modules():
        if reason := _why_not_by_itself(module):
            skipped[path] = reason
        elif known := match(type(module)):
            if reason := _why_not(module, known, unknown):
                skipped[path] = reason
            else:
                found[path] = module
        elif type(module).__name__ in _class_names():
            namesakes[path] = f"{type(module).__name__} of {type(module).__module__} is not a known one"
    if not found and not skipped:
        raise _unknown(model, namesakes)

    _expect_fixes(model, wanted, found.values())
    replaced = {path: (type(module), fused_class(type(module))) for path, module in found.items()}
    for module in found.values():
        swap(module, wanted & _fixes_for(module))
    fixed = sorted({fix for module in found.values() for fix in getattr(module, "fixes", ())})
    return PatchReport(
        replaced,
        {**skipped, **namesakes},
        _policies(model),
        tuple(fixed),
        _modules=tuple(map(weakref.ref, found.values())),
    )


def unpatch(model: nn.Module) -> None:
    """Restore the original class of every module that `patch` has swapped; other modules stay as they are.

    Args:
        model: a model, or a part or copy of one.

    Raises:
        RuntimeError: a module is folded, or its class was changed again since, as by FSDP2's `fully_shard`.
            The model is then unchanged.

    Example:
        >>> from flamingo import MaskedCrossAttention
        >>> attn = MaskedCrossAttention(dim=8, dim_visual=8)
        >>> _ = patch(attn)
        >>> unpatch(attn)
        >>> type(attn) is MaskedCrossAttention
        True
    """
    restore(model.modules())


def _why_not_by_itself(module: nn.Module) -> str:
    """Why a module is left alone whatever its family is; empty if nothing speaks against it."""
    from ..layers import Fused  # needs `flamingo`, which `import flamingo_kernels` does not

    if isinstance(module, Fused):
        return "already fused"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _class_names():
        return f"{module.original_name} is compiled to TorchScript; patch before torch.jit.script"
    return ""


def _why_not(module: nn.Module, known: Match, unknown: Callable[..., str]) -> str:
    """Why a module of a known class is left alone; empty if it can be swapped."""
    cls = type(module)
    if has_other_forward(module):
        return f"{cls.__name__} has a forward set on the instance"
    for name in ["forward", *_replaced(known.fused)]:
        if unwrapped(getattr(cls, name, None)) is not unwrapped(getattr(known.known, name, None)):
            return f"{cls.__name__} overrides {name} of {known.known.__name__}"
    if (changed_by := known.known.forward.__module__) != known.known.__module__:
        return f"{known.known.__name__} was given another forward by {changed_by}"
    if reason := unknown(cls, full_name(known.known)):
        return f"{cls.__name__}: {reason}"
    if reason := misfit(module, known.fused.anatomy):
        return f"{cls.__name__}: {reason}"
    for path, part in module.named_modules():
        name = full_name(type(part))
        if name in KNOWN and not match(type(part)) and (reason := unknown(type(part), name)):
            return f"{cls.__name__}: {path} is a {type(part).__name__}, and {reason}"
    return ""


def _replaced(fused: type[nn.Module]) -> Iterator[str]:
    """The attributes that a fused class puts in the place of its original's."""
    from ..layers import Fused  # as above

    bases = (base for base in fused.__mro__ if issubclass(base, Fused) and base is not Fused)
    yield from (name for base in bases for name in vars(base) if not name.startswith("__"))


def _known_fixes(fixes: Iterable[str]) -> frozenset[str]:
    if isinstance(fixes, str):
        raise TypeError(f"patch: expected fixes as a list of names, got {fixes!r}; pass fixes=[{fixes!r}].")
    wanted, known = frozenset(fixes), {fix for family in families() for fix in family.fixes}
    if unknown := sorted(map(str, wanted - known)):
        raise ValueError(f"patch: fix {unknown[0]!r} is not one of {', '.join(sorted(known))}.")
    return wanted


def _expect_fixes(model: nn.Module, wanted: frozenset[str], found: Iterable[nn.Module]) -> None:
    """Raise ValueError if a fix has nothing to fix, or comes too late for modules swapped before."""
    swapped = {path: module for path, module in model.named_modules() if is_swapped(module)}
    for fix in sorted(wanted):
        for path, module in swapped.items():
            if fix in _fixes_for(module) and fix not in getattr(module, "fixes", ()):
                raise ValueError(
                    f"patch: fix {fix!r} comes too late for {path or type(module).__name__}, which was "
                    "patched without it; unpatch(model), then patch it with all fixes."
                )
        if not any(fix in _fixes_for(module) for module in [*found, *swapped.values()]):
            homes = " and ".join(family.name for family in families() if fix in family.fixes)
            raise ValueError(
                f"patch: expected fixes of the modules found in {type(model).__name__}, got {fix!r}, which "
                f"is of {homes}."
            )


def _fixes_for(module: nn.Module) -> frozenset[str]:
    """The fixes that exist for a module."""
    found = match(type(module))
    return frozenset(found.family.fixes if found else ())


def _class_names() -> set[str]:
    return {name for family in families() for name in family.fused}


def _policies(model: nn.Module) -> tuple[str, ...]:
    from ..layers import Fused  # as above

    policies = (getattr(module, "policy", None) for module in model.modules() if isinstance(module, Fused))
    return tuple(sorted({str(policy) for policy in policies if policy}))


def _unknown(model: nn.Module, namesakes: dict[str, str]) -> UnsupportedError:
    classes = {type(module) for module in model.modules()}
    own = {cls for cls in classes if not cls.__module__.startswith("torch.nn.")} or classes
    names = sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in own)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return UnsupportedError(
        f"patch: found no module to replace in {type(model).__name__}, which is made of "
        f"{', '.join(names[:10])}{more}. Supported are:{supported()}",
        {path: [reason] for path, reason in namesakes.items()},
    )
