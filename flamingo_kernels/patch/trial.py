"""Tries on a small instance whether a class computes what the fused class does.

The source of a class is a proof, a trial is none: it is for source that is not known, and compares what is
likely to differ. It takes a new instance of the class, never the user's module, and gives it random weights,
also for gates and output projections. Results, gradients of inputs and weights, random numbers drawn and
attributes written must agree, in training and in evaluation, in every dtype and under autocast. Attributes of
the module that its forward reads must be those that the fused class reads, or flags that were turned.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._anatomy import contents, measure
from .._backends.dispatch import UnsupportedError
from .registry import Match
from .samples import Call, Sample, samples
from .source import unwrapped

# Some originals compute parts of it in float32, whatever the dtype.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_COARSE = (torch.float16, torch.bfloat16)
_SOFTMAX_SCALES = ("scale", "scaling", "qk_scale")
_RENAMED = {"past_key_values": "cache"}  # in transformers 5.24
_OWN = frozenset(vars(nn.Module()))  # what every module has
_PLACE = "layer_idx"  # where a layer stands in its model


class Disagreement(Exception):
    """What differs, or why nothing could be compared."""


class _Round(NamedTuple):
    """One way in which all calls are compared.

    Attributes:
        seed: of weights and inputs.
        dtype: of both.
        training: the mode.
        autocast: whether the calls are made under autocast.
        spread: how much larger than usual the weights are.
        turned: the flags that are turned.
    """

    seed: int = 0
    dtype: torch.dtype = torch.float64
    training: bool = False
    autocast: bool = False
    spread: float = 1
    turned: tuple[str, ...] = ()

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        words = [f"in {mode} and {str(self.dtype).removeprefix('torch.')}"]
        words += ["under autocast"] * self.autocast + ["with large weights"] * (self.spread > 1)
        words += [f"with {' and '.join(self.turned)} turned"] * bool(self.turned)
        return " ".join(words)

    @property
    def tolerance(self) -> float:
        return _TOLERANCE[torch.bfloat16 if self.autocast else self.dtype]

    @property
    def with_gradients(self) -> bool:
        """Whether gradients are compared: not where rounding decides them."""
        return self.dtype == torch.float64 and self.spread == 1

    def makes(self, call: Call) -> bool:
        return not (call.exact and (self.autocast or self.dtype in _COARSE))


_ROUNDS = (
    _Round(),
    _Round(seed=1, training=True),
    _Round(spread=10),  # scores of some hundreds
    *(_Round(dtype=dtype) for dtype in _TOLERANCE if dtype != torch.float64),
    _Round(dtype=torch.float32, autocast=True),
)


@dataclass
class _Trial:
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
        calls = [self._compare(how) for how in _ROUNDS]
        if not calls[0]:
            raise Disagreement(f"it computes none of the calls of a trial {_ROUNDS[0]}")
        turned: set[tuple[str, ...]] = set()
        while others := self._turns() - turned:
            calls += [self._compare(_Round(turned=flags)) for flags in sorted(others)]
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
        pairs = _sizes(self.small, self.module, self.known)
        is_size = isinstance(small, int) and (small, users) in pairs
        known = name in self.known.fused.anatomy or is_size or self._is_flag(name)
        return self._is_value(name) and not known

    def _is_flag(self, name: str) -> bool:
        """Whether an attribute is one that somebody may turn after the swap."""
        return self._is_value(name) and isinstance(getattr(self.small, name, None), bool)

    def _flags_of_parts(self) -> Iterator[str]:
        for path, name, value in values_of(self.small):
            public = isinstance(value, bool) and not name.startswith("_")
            if path and public and not _is_torchs(self.small.get_submodule(path)):
                yield name

    def _is_value(self, name: str) -> bool:
        """Whether an attribute is no method, and nothing that every module has."""
        value = inspect.getattr_static(self.small, name, None)
        method = callable(value) or isinstance(value, (property, staticmethod, classmethod))
        of_all = name in _OWN or value is inspect.getattr_static(nn.Module, name, _OWN)
        return not (method or of_all or name.startswith("__"))

    def _compare(self, how: _Round) -> int:
        """Compare all calls in one way; the number of those that the original computes."""
        original = _randomised(copy.deepcopy(self.small), how).to("cpu", how.dtype).train(how.training)
        for part, name in itertools.product(original.modules(), how.turned):
            if isinstance(flag := getattr(part, name, None), bool) and not _is_torchs(part):
                setattr(part, name, not flag)
        fused = copy.deepcopy(original)
        self.swap(fused, self.known)
        for module, names in zip((original, fused), self.read, strict=True):
            _note_reads(module, names)
        before = _state(original)
        calls = sum(_agree(original, fused, call, how) for call in self.sample.calls(self.small))
        if written := _changed(before, _state(original)):
            raise Disagreement(f"its forward writes {', '.join(written)} on the module")
        return calls


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
    with _apart():
        small = _small(module, known, build or functools.partial(sample.build, type(module), module))
        try:
            calls = _Trial(module, small, known, sample, swap).run()
        except (Disagreement, UnsupportedError):
            raise
        except Exception as error:
            raise Disagreement(f"a trial of it fails ({type(error).__name__}: {error})") from error
    return f"a trial of {calls} calls agrees, with gradients"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Nothing outside changes what happens inside, and nothing inside changes random numbers outside."""
    threads, on_cpu = torch.get_num_threads(), torch.get_default_device().type == "cpu"
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    torch.set_num_threads(1)  # for small tensors, waking others takes longer than the work
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            contextlib.nullcontext() if on_cpu else torch.device("cpu"),  # which slows every call
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        torch.set_num_threads(threads)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)


def _drawn() -> tuple[Any, ...]:
    """What differs if random numbers were drawn since the seed was set."""
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy and numpy.random.get_state()[2]
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), of_numpy


def _small(module: nn.Module, known: Match, build: Callable[[], nn.Module]) -> nn.Module:
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
        if _is_torchs(ours) and _is_torchs(theirs):
            if type(ours) is not type(theirs):
                return f"{path} is of class {type(ours).__name__}, not {type(theirs).__name__}"
            if not ours._modules and (differ := {*ours.state_dict()} ^ {*theirs.state_dict()}):
                return f"{path}.{min(differ)}"
    return ""


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _copy_values(small: nn.Module, module: nn.Module, known: Match) -> None:
    """Give a small module the values of the user's that are no sizes."""
    sizes = _sizes(small, module, known)
    small_d, users_d = (measure(each, known.fused.anatomy)[0].get("d", 1) for each in (small, module))
    for _, ours, theirs in _in_both(small.named_modules(), module.named_modules()):
        for name, value in _values(theirs) if type(ours) is type(theirs) else ():
            if name in _SOFTMAX_SCALES and isinstance(value, float):
                setattr(ours, name, value * (users_d / small_d) ** 0.5)
            elif (getattr(ours, name, None), value) not in sizes:
                setattr(ours, name, value)


def _sizes(small: nn.Module, module: nn.Module, known: Match) -> set[tuple[Any, Any]]:
    """The sizes of a small module, each with that of the user's."""
    letters, users = (measure(each, known.fused.anatomy)[0] for each in (small, module))
    sizes = {(letters[each], users[each]) for each in letters.keys() & users.keys()}
    for _, ours, theirs in _in_both(small.named_parameters(), module.named_parameters()):
        sizes |= {*zip(ours.shape, theirs.shape, strict=False)}
    for _, ours, theirs in _in_both(small.named_modules(), module.named_modules()):
        sizes.add((len(ours._modules), len(theirs._modules)))
    return sizes


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
        plain = isinstance(value, (bool, int, float, str, type(None)))
        if plain and name not in _OWN and name != _PLACE:
            yield name, value


def _randomised(module: nn.Module, how: _Round) -> nn.Module:
    """Random weights, gates and output projections too: at zero they would hide what differs."""
    torch.default_generator.manual_seed(how.seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point():
                weight.normal_(std=how.spread * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5))
    return module


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
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Tensor):
        return id(value), value.tolist()
    return id(value), len(value) if isinstance(value, Sized) else 0


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    return sorted((before.keys() | after.keys()) - same)


def _agree(original: nn.Module, fused: nn.Module, call: Call, how: _Round) -> bool:
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


def _run(module: nn.Module, call: Call, how: _Round) -> _Result:
    """One call with its gradients."""
    _seed(how.seed)
    arguments, options = call.make(how.dtype)
    inputs = _flat((arguments, options))
    before = [each.detach().clone() for each in inputs]
    _seed(0)
    with (
        torch.set_grad_enabled(how.with_gradients),
        torch.autocast("cpu", torch.bfloat16, enabled=how.autocast),
    ):
        result = module(*arguments, **options)
    drawn = _drawn()
    written = [i for i, each in enumerate(inputs) if not torch.equal(each, before[i])]
    outputs = _flat(result)
    leaves = {f"input {i}": each for i, each in enumerate(inputs) if each.requires_grad}
    leaves |= {f"weight {name}": each for name, each in module.named_parameters() if each.requires_grad}
    gradients = _gradients(outputs, leaves, how)
    return _Result(_form(result), [each.detach() for each in outputs], gradients, drawn, written)


def _gradients(outputs: list[Tensor], leaves: dict[str, Tensor], how: _Round) -> dict[str, Tensor]:
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
