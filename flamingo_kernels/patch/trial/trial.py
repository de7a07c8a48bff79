"""Compares a class with the fused one in every way: results, what its forward reads, and what it writes."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..._backends.dispatch import UnsupportedError
from ..registry import Match
from ..samples import Sample, samples
from ..source import unwrapped
from .apart import apart
from .call import agrees
from .rounds import ROUNDS, Disagreement, Round
from .small import OWN, PLAIN, is_torchs, make_small, randomised, sizes_of, values_of

_RENAMED = {"past_key_values": "cache"}  # in transformers 5.24


def compare(
    module: nn.Module,
    known: Match,
    swap: Callable[[nn.Module, Match], None],
    build: Callable[[], nn.Module] | None = None,
) -> str:
    """What was compared and agreed, in words.

    Args:
        module: the user's module, of which only sizes and flags are read.
        known: its class, and the class that is to replace it.
        swap: gives a module and its parts the fused classes.
        build: makes a small instance of the module's class. Default: its constructor, by the known arguments.

    Raises:
        Disagreement: something differs, or nothing can be compared.
    """
    sample = samples().get(known.fused)
    if sample is None:
        raise Disagreement(f"no trial is written for {known.fused.__name__}")
    with apart():
        small = make_small(module, known, build or functools.partial(sample.build, type(module), module))
        try:
            calls = Trial(module, small, known, sample, swap).run()
        except (Disagreement, UnsupportedError):
            raise
        except Exception as error:
            raise Disagreement(f"a trial of it fails ({type(error).__name__}: {error})") from error
    return f"a trial of {calls} calls agrees, with gradients"


@dataclass
class Trial:
    """A small module of the user's class, compared in one way after another with the fused class.

    Attributes:
        module: the user's module.
        small: the small one, which itself is never called.
        known: the class, and the class that is to replace it.
        sample: the calls.
        swap: gives a module and its parts the fused classes.
        read: the attributes that the original's forward has read, and those that the fused one has.
    """

    module: nn.Module
    small: nn.Module
    known: Match
    sample: Sample
    swap: Callable[[nn.Module, Match], None]
    read: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))

    def run(self) -> int:
        """The number of calls that were compared. Raises Disagreement if one differs."""
        calls = [self._compare(how) for how in ROUNDS]
        if not calls[0]:
            raise Disagreement(f"it computes none of the calls of a trial {ROUNDS[0]}")
        turned: set[tuple[str, ...]] = set()
        while others := self._turns() - turned:
            calls += [self._compare(Round(turned=flags)) for flags in sorted(others)]
            turned |= others
        if unknown := sorted(filter(self._is_unknown, self.read[0] - self.read[1])):
            raise Disagreement(f"its forward reads {', '.join(unknown)}, which the fused class does not")
        return sum(calls)

    def _turns(self) -> set[tuple[str, ...]]:
        """The flags to turn, one or two at a time: those of parts, and those that were read so far."""
        flags = sorted({*filter(self._is_flag, self.read[0] | self.read[1]), *self._flags_of_parts()})
        return {*itertools.combinations(flags, 1), *itertools.combinations(flags, 2)}

    def _is_unknown(self, name: str) -> bool:
        """Whether an attribute that the fused class does not read may choose what the original computes."""
        small, users = (getattr(each, name, None) for each in (self.small, self.module))
        pairs = sizes_of(self.small, self.module)
        is_size = isinstance(small, int) and (small, users) in pairs
        known = name in self.known.fused.anatomy or is_size or self._is_flag(name)
        return self._is_value(name) and not known

    def _is_flag(self, name: str) -> bool:
        """Whether an attribute is one that somebody may turn after the swap."""
        return self._is_value(name) and isinstance(getattr(self.small, name, None), bool)

    def _flags_of_parts(self) -> Iterator[str]:
        for path, name, value in values_of(self.small):
            public = isinstance(value, bool) and not name.startswith("_")
            if path and public and not is_torchs(self.small.get_submodule(path)):
                yield name

    def _is_value(self, name: str) -> bool:
        """Whether an attribute is no method, and nothing that every module has."""
        value = inspect.getattr_static(self.small, name, None)
        method = callable(value) or isinstance(value, (property, staticmethod, classmethod))
        of_all = name in OWN or value is inspect.getattr_static(nn.Module, name, OWN)
        return not (method or of_all or name.startswith("__"))

    def _compare(self, how: Round) -> int:
        """Compare all calls in one way; the number of those that the original computes."""
        original = randomised(copy.deepcopy(self.small), how).to("cpu", how.dtype).train(how.training)
        for part, name in itertools.product(original.modules(), how.turned):
            if isinstance(flag := getattr(part, name, None), bool) and not is_torchs(part):
                setattr(part, name, not flag)
        fused = copy.deepcopy(original)
        self.swap(fused, self.known)
        for module, names in zip((original, fused), self.read, strict=True):
            _note_reads(module, names)
        before = _state(original)
        calls = sum(agrees(original, fused, call, how) for call in self.sample.calls(self.small))
        if written := _changed(before, _state(original)):
            raise Disagreement(f"its forward writes {', '.join(written)} on the module")
        return calls


def _note_reads(module: nn.Module, names: set[str]) -> None:
    """Add to names what is read from a module from now on."""
    cls = type(module)

    def read(self: nn.Module, name: str) -> Any:
        names.add(name)
        return cls.__getattribute__(self, name)

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})


def _state(module: nn.Module) -> dict[str, Any]:
    """What a forward may leave on a module."""
    return {
        f"{path}.{name}".lstrip("."): _content(value)
        for path, part in module.named_modules()
        for name, value in (vars(part) | part._parameters | part._buffers).items()
    }


def _content(value: Any) -> Any:
    """A value, or what tells an object from another and shows most changes of it."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), value.tolist()
    return id(value), len(value) if isinstance(value, Sized) else 0


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    return sorted((before.keys() | after.keys()) - same)


def why_other_arguments(cls: type[nn.Module], fused: type[nn.Module]) -> str:
    """Why a forward of unknown source may be called as the fused one may not; empty if it may not."""
    ours = _arguments(fused)
    for place, (name, each) in enumerate(_arguments(cls).items()):
        known = _RENAMED.get(name, name)
        if known not in ours:
            return f"its forward takes {'any names' if name == '**' else name}, which is not known"
        if each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD and list(ours).index(known) != place:
            return f"its forward takes {name} in another place"
        if each.default not in (inspect.Parameter.empty, ours[known].default):
            return f"its forward takes {name}={each.default!r} by default"
    return ""


def _arguments(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    forward: Any = unwrapped(cls.forward)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return {"**" if each.kind == each.VAR_KEYWORD else each.name: each for each in parameters}
