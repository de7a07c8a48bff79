"""patch and unpatch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from .._dispatch import UnsupportedError
from .family import Match, families, match, supported
from .report import PatchReport
from .swap import fused_class, has_other_forward, restore, swap


def patch(model: nn.Module, *, fixes: Iterable[str] = ()) -> PatchReport:
    """Swap the cross-attention and resampler modules of a model for fast ones that compute the same.

    Each module found keeps its identity, parameters, hooks and place, and gets a subclass of its class with
    another forward. So optimizers, `state_dict` and every other reference to it stay as they are, and
    `isinstance` still holds. The media mask follows the policy that the model had. ::

        patch(model)                   until unpatch(model)
        with patch(model): ...         until the end of the block

    What the originals compute is computed, known bugs included, except those named in `fixes`:

    ============= ============================================================================================
    uniform_rows  open-flamingo, flamingo-pytorch: text whose image was not passed averages all images
    row_leak      Mllama: text before the first image attends to every image and its padding
    causal        Mllama under "sdpa": without a mask, row t sees no vision token after t
    ============= ============================================================================================

    A model patched again stays as it is. Patch before `torch.jit.script` and before FSDP2's `fully_shard`,
    whose wrapped classes cannot be taken back; modules inside FSDP1 and `torch.compile` wrappers are found.

    Args:
        model: a model, or a single module, of `flamingo`, open-flamingo, flamingo-pytorch or transformers
            (Idefics, Mllama, Idefics2's and Evolla's resamplers, Evolla's aligner); versions: see the README.
            Subclasses of their classes are swapped too, unless they override what would be replaced.
        fixes: names from the table above. Default: none.

    Returns:
        What was swapped and what was not, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown fix.
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
    for path, module in model.named_modules():
        if reason := _why_not_by_itself(module):
            skipped[path] = reason
        elif known := match(type(module)):
            if reason := _why_not(module, known):
                skipped[path] = reason
            else:
                found[path] = module
        elif type(module).__name__ in _class_names():
            namesakes[path] = f"{type(module).__name__} of {type(module).__module__} is not a known one"
    if not found and not skipped:
        raise _unknown(model, namesakes)

    replaced = {path: (type(module), fused_class(type(module))) for path, module in found.items()}
    for module in found.values():
        swap(module, wanted & _fixes_of(module))
    fixed = sorted({fix for module in found.values() for fix in getattr(module, "fixes", ())})
    return PatchReport(
        replaced,
        {**skipped, **namesakes},
        _policies(model),
        tuple(fixed),
        tuple(map(weakref.ref, found.values())),
    )


def unpatch(model: nn.Module) -> None:
    """Give every module that `patch` swapped its original class back; a model never patched stays as it is.

    Args:
        model: a model, or a part or copy of one.

    Raises:
        RuntimeError: a module is folded, or its class was changed again since, as by FSDP2's `fully_shard`.
            Nothing changes.

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
    """Why a module is left alone whatever its family does."""
    from ..layers import Fused

    if isinstance(module, Fused):
        return "already fused"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in _class_names():
        return f"{module.original_name} is compiled to TorchScript; patch before torch.jit.script"
    return ""


def _why_not(module: nn.Module, known: Match) -> str:
    """Why a module of a known class is left alone."""
    cls = type(module)
    if has_other_forward(module):
        return f"{cls.__name__} has a forward set on the instance"
    replaced = ["forward", *(name for name in vars(known.fused) if not name.startswith("__"))]
    for name in replaced:
        if getattr(cls, name, None) is not getattr(known.known, name, None):
            return f"{cls.__name__} overrides {name} of {known.known.__name__}"
    if (changed_by := known.known.forward.__module__) != known.known.__module__:
        return f"{known.known.__name__} was given another forward by {changed_by}"
    if not _accepts(known.fused, known.known):
        takes = list(inspect.signature(known.known.forward).parameters)
        return f"{cls.__name__} is of another version: its forward takes {', '.join(takes[1:])}"
    return ""


def _accepts(fused: type[nn.Module], original: type[nn.Module]) -> bool:
    """Whether every argument that the original takes means the same to what replaces it."""
    takes, offers = (inspect.signature(cls.forward).parameters for cls in (original, fused))
    positional = [name for name, p in offers.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    in_order = all(mine == its for mine, its in zip(positional, takes, strict=False))
    return in_order and takes.keys() <= offers.keys()


def _known_fixes(fixes: Iterable[str]) -> frozenset[str]:
    wanted, known = frozenset(fixes), {fix for family in families() for fix in family.fixes}
    if unknown := sorted(wanted - known):
        raise ValueError(f"patch: fix {unknown[0]!r} is not one of {', '.join(sorted(known))}.")
    return wanted


def _fixes_of(module: nn.Module) -> frozenset[str]:
    found = match(type(module))
    return frozenset(found.family.fixes if found else ())


def _class_names() -> set[str]:
    return {name for family in families() for name in family.fused}


def _policies(model: nn.Module) -> tuple[str, ...]:
    from ..layers import Fused

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
