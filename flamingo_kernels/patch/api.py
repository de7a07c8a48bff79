"""patch and unpatch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from .._backends.dispatch import UnsupportedError, why_no_kernels
from .known import KNOWN
from .linears import expect_table, find, swap_linear
from .recognise import Found, Left, Recogniser
from .registry import Match, families, supported
from .report import PatchReport
from .swap import is_swapped, restore, swap

Target = str | tuple[str, Callable[[], nn.Module]]


def patch(
    model: nn.Module,
    *,
    fixes: Iterable[str] = (),
    like: Mapping[str | type[nn.Module], Target] | None = None,
    linears: bool = False,
) -> PatchReport:
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

    A module is swapped if the source of its forward, with everything that it calls, is that of a known
    version, whatever the name and place of its class: copies of open_flamingo's `helpers.py` are swapped too.
    It must have the parts that this version has. Where a class has the name and place of a known one and
    other source, as in a new release, a new small instance of it is tried: the class is swapped if outputs
    and gradients agree. Whatever is left alone at a known place gives one warning, and the report says why.
    For a class that none of this finds, `like` says what it is, and the trial decides. ::

        patch(model, like={"MyResampler": "open_flamingo.PerceiverResampler"})

    The original's forward calls parts with hooks, and all parts while there are global hooks on modules.

    A model patched again stays as it is. Patch before `torch.jit.script` and before FSDP2's `fully_shard`,
    whose wrapped classes cannot be taken back; modules inside FSDP1 and `torch.compile` wrappers are found.

    Args:
        model: a model, or a single module, of `flamingo`, open-flamingo, flamingo-pytorch, transformers
            (Idefics, Mllama, Idefics2's and Evolla's resamplers, Evolla's aligner), torchtune, or one of the
            other families in the table of `docs/models.md`, with their versions.
            Subclasses of their classes are swapped too, unless they override what would be replaced.
        fixes: names from the table above, for bugs that the model has. Default: none.
        like: known classes, as "open_flamingo.PerceiverResampler", by the classes of the model that compute
            the same with parts of the same names: by name, full name, or the class itself. For the trial a
            small instance is made by the known constructor's arguments; where they do not fit, give
            ("open_flamingo.PerceiverResampler", function that makes one). Default: none.
        linears: also give every plain `nn.Linear` of the model, and transformers' `Conv1D`, the product that
            is the fastest for its rows on this processor (`flamingo_kernels.linear`); then any model will do.
            Rounding may differ, as between libraries. What is quantised, an adapter's or another class stays.
            Default: no.

    Returns:
        What was swapped and what was not, and why. `print` shows it as a table.

    Raises:
        TypeError: `model` is no module, `fixes` is a string, or `like` no dict.
        ValueError: a fix that is unknown, that belongs to other models, or that comes after the modules were
            patched without it; or `like` names no class of the model, or none that is known; or the file in
            which `tune linear` keeps what it measured holds something else. The model is then unchanged.
        UnsupportedError: nothing in the model is known, or a class is not what `like` says, and why. The
            model is then unchanged.

    Limits: a trial runs on the CPU and compares the calls that are likely to differ; only known source is a
    proof.

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
    wanted, recognise = _known_fixes(fixes), Recogniser.of(like or {})
    seen = {path: (module, recognise(module)) for path, module in model.named_modules()}
    found = {path: (module, what) for path, (module, what) in seen.items() if isinstance(what, Found)}
    left = {path: what for path, (_, what) in seen.items() if isinstance(what, Left)}
    recognise.expect_all_used(model)
    layers = list(find(model)) if linears else []
    chosen = {path: module for path, module, reason in layers if not reason}
    expect_table(chosen.values())
    any_known = found or chosen or (linears and any(map(is_swapped, model.modules())))
    if not any_known and all(each.namesake for each in left.values()):
        raise _unknown(model, {path: each.reason for path, each in left.items()})

    _expect_fixes(model, wanted, found.values())
    replaced = {}
    for path, (module, (known, _)) in found.items():
        original = type(module)
        swap(module, known.fused, wanted & frozenset(known.family.fixes))
        replaced[path] = (original, type(module))
    classes = {path: type(module) for path, module in chosen.items()}
    for layer in chosen.values():
        swap_linear(layer)
    _warn_of(model, left)
    if why := why_no_kernels():
        warnings.warn(f"patch: {why}", UserWarning, stacklevel=2)
    modules = [module for module, _ in found.values()]
    return PatchReport(
        replaced,
        {path: each.reason for path, each in left.items()}
        | {path: reason for path, _, reason in layers if reason},
        _policies(model),
        tuple(sorted({fix for module in modules for fix in getattr(module, "fixes", ())})),
        {path: what.note for path, (_, what) in found.items() if what.note},
        classes,
        _modules=tuple(map(weakref.ref, [*modules, *chosen.values()])),
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


def _known_fixes(fixes: Iterable[str]) -> frozenset[str]:
    if isinstance(fixes, str):
        raise TypeError(f"patch: expected fixes as a list of names, got {fixes!r}; pass fixes=[{fixes!r}].")
    wanted, known = frozenset(fixes), {fix for family in families() for fix in family.fixes}
    if unknown := sorted(map(str, wanted - known)):
        raise ValueError(f"patch: fix {unknown[0]!r} is not one of {', '.join(sorted(known))}.")
    return wanted


def _expect_fixes(model: nn.Module, wanted: frozenset[str], found: Iterable[tuple[nn.Module, Found]]) -> None:
    """Raise ValueError if a fix has nothing to fix, or comes too late for modules swapped before."""
    swapped = {path: module for path, module in model.named_modules() if is_swapped(module)}
    possible = {fix for _, what in found for fix in what.match.family.fixes}
    for fix in sorted(wanted):
        for path, module in swapped.items():
            if fix in _fixes_of(module) and fix not in getattr(module, "fixes", ()):
                raise ValueError(
                    f"patch: fix {fix!r} comes too late for {path or type(module).__name__}, which was "
                    "patched without it; unpatch(model), then patch it with all fixes."
                )
        if fix not in possible and not any(fix in _fixes_of(module) for module in swapped.values()):
            homes = ", ".join(family.name for family in families() if fix in family.fixes)
            raise ValueError(
                f"patch: expected fixes of the modules found in {type(model).__name__}, got {fix!r}, which "
                f"is of {homes}."
            )


def _fixes_of(module: nn.Module) -> frozenset[str]:
    """The fixes that exist for a swapped module."""
    bases = type(module).__mro__
    return frozenset(fix for family in families() if {*family.classes} & {*bases} for fix in family.fixes)


def _warn_of(model: nn.Module, left: Mapping[str, Left]) -> None:
    """One warning of all modules that have the name and place of a known class and stay as they are."""
    reasons: dict[str, list[Match]] = {}
    for each in left.values():
        if each.match is not None:
            reasons.setdefault(each.reason, []).append(each.match)
    if not reasons:
        return
    lines = [
        f"{len(same)} {same[0].known.__name__} of {same[0].family.module} ({_versions(same[0])}): {reason}"
        for reason, same in reasons.items()
    ]
    warnings.warn(
        f"patch: left modules of {type(model).__name__} as they are: {' | '.join(lines)}. To have them "
        "swapped: install a known version, undo what changed them, or say patch(model, like={...}) what a "
        "class is; a new release of a library is worth an issue.",
        UserWarning,
        stacklevel=3,
    )


def _versions(known: Match) -> str:
    """The installed version of a class's library, and the known ones."""
    versions = ", ".join(dict.fromkeys(KNOWN[known.name].values()))
    try:
        return f"installed: {version(known.family.versions.partition(' ')[0])}, known: {versions}"
    except PackageNotFoundError:
        return f"known: {versions}"


def _policies(model: nn.Module) -> tuple[str, ...]:
    from ..layers import Fused  # needs `flamingo`, which `import flamingo_kernels` does not

    policies = (getattr(module, "policy", None) for module in model.modules() if isinstance(module, Fused))
    return tuple(sorted({str(policy) for policy in policies if policy}))


def _unknown(model: nn.Module, namesakes: dict[str, str]) -> UnsupportedError:
    classes = {type(module) for module in model.modules()}
    own = {cls for cls in classes if not cls.__module__.startswith("torch.nn.")} or classes
    names = sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in own)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return UnsupportedError(
        f"patch: found no module to replace in {type(model).__name__}, which is made of "
        f"{', '.join(names[:10])}{more}. A class that computes the same as one below is swapped by "
        'patch(model, like={"MyResampler": "open_flamingo.PerceiverResampler"}), linear layers by '
        f"linears=True. Supported are:{supported()}",
        {path: [reason] for path, reason in namesakes.items()},
    )
