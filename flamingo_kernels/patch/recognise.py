"""Which fused class may replace a module, how that is known, and why none may.

A class is known by its name and place, or as an exact copy of a known one under any name and place, or
because the caller says what it is. The source of a known class proves that the fused one computes the same.
Where the source is another, and where the caller says so, a trial of a small instance must show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from .._anatomy import contents, misfit
from .._backends.dispatch import UnsupportedError
from . import trial
from .known import KNOWN, full_name
from .registry import Match, families, match, replaced_by, targets
from .samples import samples
from .source import Unreadable, code_hash, replaced, unwrapped
from .swap import has_other_forward, swap

Like = Mapping[Any, Any]


class Found(NamedTuple):
    """A module that can be swapped.

    Attributes:
        match: its class, and the class that replaces it.
        note: how it was recognised, if not by name, place and source.
    """

    match: Match
    note: str = ""


class Left(NamedTuple):
    """A module that stays as it is, though it has to do with a known class.

    Attributes:
        reason: why.
        match: the class that its name and place say it is; None if they do not.
        namesake: whether it shares a known class's name alone.
    """

    reason: str
    match: Match | None = None
    namesake: bool = False


@dataclass(frozen=True)
class _Claim:
    """What the caller says that a class is."""

    key: Any
    target: str
    build: Callable[[], nn.Module] | None

    def fits(self, cls: type) -> bool:
        return self.key in (cls, cls.__name__, full_name(cls))


@dataclass
class Recogniser:
    """Decides for one module after another, and remembers code and trials, as many modules have one class.

    Attributes:
        claims: what the caller says that classes are.
    """

    claims: list[_Claim]
    _trials: dict[Any, str | trial.Disagreement] = field(default_factory=dict)
    _code: Callable[..., str] = field(default_factory=lambda: cache(code_hash))

    @classmethod
    def of(cls, like: Like) -> Recogniser:
        """Raises TypeError or ValueError if `like` does not say which class is which."""
        if not isinstance(like, Mapping):
            raise TypeError(f"patch: expected like as a dict of classes, got {type(like).__name__}.")
        return cls([_claim(key, value) for key, value in like.items()])

    def __call__(self, module: nn.Module) -> Found | Left | None:
        """What a module is; None if it has nothing to do with what is known.

        Raises:
            UnsupportedError: it is not what the caller says it is.
        """
        if reason := _why_not_by_itself(module):
            return Left(reason)
        claimed = self._claimed(type(module))
        if claimed is not None:
            return self._by_claim(module, *claimed)
        known = match(type(module))
        if known is None:
            return self._by_code(module) or _namesake(module)
        return self._as_another(module, known) or self._by_place(module, known)

    def _claimed(self, cls: type) -> tuple[Match, _Claim] | None:
        for base in cls.__mro__:
            for claim in self.claims:
                if claim.fits(base):
                    return Match(base, *targets()[claim.target]), claim
        return None

    def _by_claim(self, module: nn.Module, known: Match, claim: _Claim) -> Found:
        parts = misfit(module, known.fused.anatomy)
        reason = _why_not_swap(module, known) or parts or _why_own(module, known)
        if not reason:
            try:
                return Found(known, f"as {claim.target}, {self._try(module, known, claim.build)}")
            except trial.Disagreement as error:
                reason = str(error)
        said = f"patch: like says that {full_name(known.known)} is a {claim.target}, but {reason}."
        raise UnsupportedError(said, {claim.target: [reason]})

    def _by_place(self, module: nn.Module, known: Match) -> Found | Left:
        cls = type(module)
        if reason := _why_not_swap(module, known):
            return Left(reason, known)
        parts, doubts = misfit(module, known.fused.anatomy), list(self._doubts(module, known))
        unreadable = [str(doubt) for doubt in doubts if isinstance(doubt, Unreadable)]
        if not parts and not doubts:
            return Found(known)
        tried = parts or "; ".join(unreadable) or _why_replaced(module, known) or _why_own(module, known)
        if not tried:
            try:
                return Found(known, f"{doubts[0]}; {self._try(module, known, None)}")
            except trial.Disagreement as error:
                tried = str(error)
        reasons = dict.fromkeys([*map(str, doubts), tried])
        return Left(f"{cls.__name__}: {'; '.join(reasons)}", known)

    def _try(self, module: nn.Module, known: Match, build: Callable[[], nn.Module] | None) -> str:
        """What a trial has compared. Raises `trial.Disagreement`, also when asked again."""
        key = (type(module), known.fused, build, trial.values_of(module))
        if key not in self._trials:
            self._trials[key] = "as itself"  # a class may be a part of itself
            try:
                self._trials[key] = trial.compare(module, known, self._swap_all, build)
            except trial.Disagreement as error:
                self._trials[key] = error
        outcome = self._trials[key]
        if isinstance(outcome, trial.Disagreement):
            raise outcome
        return outcome

    def _doubts(self, module: nn.Module, known: Match) -> Iterator[Exception]:
        """Where the source of a known class, or of a part that it may be computed with, is not known."""
        yield from self._doubt(type(module), known.name)
        for path, part in module.named_modules():
            name = full_name(type(part))
            if name in KNOWN and not match(type(part)):
                for doubt in self._doubt(type(part), name):
                    yield type(doubt)(f"{path} is a {type(part).__name__}, and {doubt}")

    def _doubt(self, cls: type[nn.Module], name: str) -> Iterator[Exception]:
        try:
            code = self._code(cls, name.rpartition(".")[0])
        except Unreadable as error:
            yield error
        else:
            if code not in KNOWN[name]:
                yield LookupError(f"its forward is not one that is known: hash {code}")

    def _as_another(self, module: nn.Module, known: Match) -> Found | Left | None:
        """A module at the place of a known class, with the code of another one, as in an older release."""
        if self._is_copy(module, known):
            return None
        return self._by_code(module)

    def _by_code(self, module: nn.Module) -> Found | Left | None:
        """A module whose class, or a base of it, is an exact copy of a known class."""
        bases = [
            base
            for base in type(module).__mro__
            if "forward" in vars(base) and not base.__module__.startswith("torch.")
        ]
        for target, base in itertools.product(_with_the_same_parts(module) if bases else (), bases):
            known = Match(base, *targets()[target])
            if self._is_copy(module, known):
                reason = _why_not_swap(module, known)
                return Left(reason) if reason else Found(known, f"a copy of {target}")
        return None

    def _is_copy(self, module: nn.Module, known: Match) -> bool:
        home, origin = known.known.__module__, known.family.module
        try:
            return self._code(type(module), home, origin=origin) in KNOWN[known.name]
        except Unreadable:
            return False

    def _swap_all(self, module: nn.Module, known: Match) -> None:
        """Swap a module, and those of its parts that would be swapped in a model."""
        parts = [(part, self._part(part)) for part in module.modules() if part is not module]
        swap(module, known.fused)
        for part, found in parts:
            if isinstance(found, Found):
                swap(part, found.match.fused)

    def _part(self, module: nn.Module) -> Found | Left | None:
        """What a part of a small module is; None too if no claim holds for it, with the flags that it has."""
        try:
            return self(module)
        except UnsupportedError:
            return None

    def expect_all_used(self, model: nn.Module) -> None:
        """Raise ValueError if the caller speaks of a class that no module has or had before a swap."""
        classes = {base for module in model.modules() for base in type(module).__mro__}
        for claim in self.claims:
            if not any(map(claim.fits, classes)):
                raise ValueError(
                    f"patch: expected like to name classes of the modules in {type(model).__name__}, got "
                    f"{_key_name(claim.key)!r}, which none of them has."
                )


def _claim(key: Any, value: Any) -> _Claim:
    target, build = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    words = isinstance(key, (str, type)) and isinstance(target, str)
    if not words or not (build is None or callable(build)):
        raise TypeError(
            "patch: expected like={class: known class} or like={class: (known class, function that builds a "
            f"small one)}}, got {{{key!r}: {value!r}}}."
        )
    if target not in targets():
        raise ValueError(
            f"patch: expected like[{_key_name(key)!r}] to be one of {', '.join(targets())}, got {target!r}."
        )
    return _Claim(key, target, build)


def _key_name(key: Any) -> str:
    return key if isinstance(key, str) else full_name(key)


def _why_not_by_itself(module: nn.Module) -> str:
    """Why a module is left alone whatever its family is; empty if nothing speaks against it."""
    from ..layers import Fused  # needs `flamingo`, which `import flamingo_kernels` does not

    if isinstance(module, Fused):
        return "already fused"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in class_names():
        return f"{module.original_name} is compiled to TorchScript; patch before torch.jit.script"
    return ""


def _why_not_swap(module: nn.Module, known: Match) -> str:
    """Why calling a module does not run the forward of its known class; empty if it does."""
    cls = type(module)
    if has_other_forward(module):
        return f"{cls.__name__} has a forward set on the instance"
    for name in ["forward", *replaced_by(known.fused)]:
        if unwrapped(getattr(cls, name, None)) is not unwrapped(getattr(known.known, name, None)):
            return f"{cls.__name__} overrides {name} of {known.known.__name__}"
    forward = known.known.forward
    if (changed_by := forward.__module__) != known.known.__module__ and "forward" in vars(known.known):
        return f"{known.known.__name__} was given another forward by {changed_by}"
    return ""


def _why_replaced(module: nn.Module, known: Match) -> str:
    """Which functions somebody has put in the place of those that the forward calls; empty if nobody has."""
    names = replaced(type(module), known.family.module)
    return f"somebody has replaced {', '.join(names)} of {known.family.module}" if names else ""


def _why_own(module: nn.Module, known: Match) -> str:
    """Why a class of unknown source cannot be given the attributes of the fused class."""
    cls = type(module)
    for name in replaced_by(known.fused):
        if hasattr(cls, name) and not hasattr(nn.Module, name):
            return f"it has {name}, which the fused class replaces"
    return trial.why_other_arguments(cls, known.fused)


def _with_the_same_parts(module: nn.Module) -> Iterator[str]:
    """The known classes that are made of the same parts."""
    names = frozenset(contents(module))
    for target, (fused, _) in targets().items():
        if names <= fused.anatomy.keys() and not misfit(module, fused.anatomy):
            yield target


def _namesake(module: nn.Module) -> Left | None:
    """A module that shares the name of a known class, with what it resembles and what differs."""
    cls = type(module)
    if cls.__name__ not in class_names():
        return None
    same = {
        target: misfit(module, fused.anatomy)
        for target, (fused, _) in targets().items()
        if fused.__name__ == cls.__name__
    }
    target = min(same, key=lambda each: (bool(same[each]), targets()[each][0] not in samples()))
    what = f"{cls.__name__} of {cls.__module__} is not a known one: "
    if same[target]:
        return Left(f"{what}unlike {target}, {same[target]}", namesake=True)
    hint = f'like={{"{cls.__name__}": "{target}"}} has it tried'
    return Left(f"{what}it has the parts of {target} and another forward; {hint}", namesake=True)


@cache
def class_names() -> frozenset[str]:
    return frozenset(name for family in families() for name in family.fused)
