"""Tries on a small instance whether a class computes what the fused class does.

The source of a class is a proof, a trial is none: it is for source that is not known, and compares what is
likely to differ. It takes a new instance of the class, never the user's module, and gives it random weights,
also for gates and output projections. The outputs, the gradients of inputs and weights, and the calls that
raise must agree, in training and in evaluation, in float64 and then in the dtype of the user's weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._anatomy import contents, measure
from .registry import Match
from .samples import SAMPLES, Call, Sample
from .source import unwrapped

_SEEDS = (0, 1)
# Some originals compute parts of it in float32, whatever the dtype.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_SOFTMAX_SCALES = ("scale", "scaling", "qk_scale")
_RENAMED = {"past_key_values": "cache"}  # in transformers 5.24

_Flags = frozenset[tuple[str, Any]]


class Disagreement(Exception):
    """What differs, or why nothing could be compared."""


class _Result(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


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
    sample = SAMPLES.get(known.fused)
    if sample is None:
        raise Disagreement(f"no trial is written for {known.fused.__name__}")
    with _apart():
        original = _small(module, known, build or functools.partial(sample.build, type(module), module))
        calls = sum(
            _compare(original, known, sample, swap, each) for each in _rounds(original, _dtype(module))
        )
    if not calls:
        raise Disagreement("it computes none of the calls of a trial")
    return f"a trial of {calls} calls agrees, with gradients"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Nothing outside changes what happens inside, and nothing inside changes random numbers outside."""
    state, threads = random.getstate(), torch.get_num_threads()
    torch.set_num_threads(1)  # for small tensors, waking others takes longer than the work
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        random.setstate(state)
        torch.set_num_threads(threads)


def _small(module: nn.Module, known: Match, build: Callable[[], nn.Module]) -> nn.Module:
    """A new small module of the user's class, with random weights and the flags of the user's module."""
    try:
        small = build()
    except Exception as error:
        raise Disagreement(
            f"no small one can be made for a trial ({type(error).__name__}: {error})"
        ) from error
    if type(small) is not type(module):
        raise Disagreement(f"the one made for a trial is a {type(small).__name__}")
    if set(map(id, small.parameters())) & set(map(id, module.parameters())):
        raise Disagreement("a new one shares weights with the others")
    (sizes, reason), (user_sizes, _) = (measure(each, known.fused.anatomy) for each in (small, module))
    if reason or set(contents(small)) != set(contents(module)):
        raise Disagreement(f"a new one has other parts{reason and f': {reason}'}")
    users = dict(module.named_modules())
    for path, part in small.named_modules():
        if path in users:
            for name, value in flags_of(users[path]):
                if name in _SOFTMAX_SCALES and "d" in sizes:
                    value *= (user_sizes["d"] / sizes["d"]) ** 0.5
                setattr(part, name, value)
    return small


def flags_of(module: nn.Module) -> _Flags:
    """The plain values of a module that are no sizes: they may choose what its forward computes."""
    values = vars(module).items()
    plain = (bool, float, str, type(None))
    return frozenset(
        (name, value)
        for name, value in values
        if isinstance(value, plain) and not name.startswith("_") and name not in ("training", "fixes")
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(module: nn.Module) -> torch.dtype:
    dtypes = [each.dtype for each in module.parameters() if each.dtype in _TOLERANCE]
    return dtypes[0] if dtypes else torch.float32


class _Round(NamedTuple):
    """One way in which all calls are compared.

    Attributes:
        seed: of weights and inputs.
        dtype: of both; gradients are compared in float64 alone.
        training: the mode.
        flag: one that is turned, or None.
    """

    seed: int
    dtype: torch.dtype = torch.float64
    training: bool = False
    flag: str | None = None

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"in {mode} and {_word(self.dtype)}{f' with {self.flag} turned' if self.flag else ''}"


def _rounds(small: nn.Module, dtype: torch.dtype) -> Iterator[_Round]:
    for seed in _SEEDS:
        yield _Round(seed)
        yield _Round(seed, training=True)
    for name, value in sorted(flags_of(small)):
        if isinstance(value, bool):
            yield _Round(0, flag=name)  # somebody may turn it after the swap
    if dtype != torch.float64:
        yield _Round(0, dtype)


def _compare(
    small: nn.Module, known: Match, sample: Sample, swap: Callable[[nn.Module, Match], None], how: _Round
) -> int:
    """Compare all calls in one way; the number of those that the original computes."""
    original = _randomised(copy.deepcopy(small), how.seed).to(how.dtype).train(how.training)
    if how.flag:
        setattr(original, how.flag, not getattr(original, how.flag))
    fused = copy.deepcopy(original)
    swap(fused, known)
    return sum(_agree(original, fused, call, how) for call in sample.calls(original))


def _agree(original: nn.Module, fused: nn.Module, call: Call, how: _Round) -> bool:
    """Whether a call could be compared. Raises Disagreement where the results differ."""
    before = _state(original)
    try:
        expected = _run(original, call, how)
    except Exception:
        return False  # nobody relies on a call that the original refuses
    if (written := _state(original)) != before:
        names = sorted({path for path, _ in before.symmetric_difference(written)})
        raise Disagreement(f"its forward writes {', '.join(names)} on the module")
    if not original.training and _differs(_run(original, call, how, luck=1), expected, how.dtype):
        raise Disagreement(f'it is random: two calls "{call.title}" differ')
    try:
        got = _run(fused, call, how)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Disagreement(
            f'the call "{call.title}" is one that the fused class refuses ({reason})'
        ) from error
    if differs := _differs(got, expected, how.dtype):
        raise Disagreement(f'in the call "{call.title}" of a trial {how}, {differs}')
    return True


def _run(module: nn.Module, call: Call, how: _Round, luck: int = 0) -> _Result:
    """One call with its gradients.

    Args:
        luck: seed of what the forward draws.
    """
    torch.default_generator.manual_seed(how.seed)
    arguments, options = call.make(how.dtype)
    torch.default_generator.manual_seed(luck)
    random.seed(luck)
    outputs = list(_tensors(module(*arguments, **options)))
    leaves = {
        f"input {i}": each for i, each in enumerate(_tensors((arguments, options))) if each.requires_grad
    }
    leaves |= {f"weight {name}": each for name, each in module.named_parameters() if each.requires_grad}
    torch.default_generator.manual_seed(how.seed)
    terms = [(out * torch.randn_like(out)).sum() for out in outputs if out.requires_grad]
    if not terms or how.dtype != torch.float64:
        return _Result([out.detach() for out in outputs], {})
    total = functools.reduce(torch.add, terms)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves.values(), gradients, strict=True)
    )
    return _Result([out.detach() for out in outputs], dict(zip(leaves, zeros, strict=True)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _differs(got: _Result, expected: _Result, dtype: torch.dtype) -> str:
    """The first difference between two results in words; empty if there is none."""
    if [each.shape for each in got.outputs] != [each.shape for each in expected.outputs]:
        return "the outputs have other shapes"
    pairs = [("the result", *pair) for pair in zip(got.outputs, expected.outputs, strict=True)]
    pairs += [
        (f"the gradient of {name}", got.gradients[name], grad) for name, grad in expected.gradients.items()
    ]
    for name, a, b in pairs:
        if a.dtype != b.dtype:
            return f"{name} is {a.dtype}, expected {b.dtype}"
        a, b = a.double(), b.double()
        bound = _TOLERANCE[dtype] * (b.abs().nan_to_num().max().item() if b.numel() else 0)
        if not torch.allclose(a, b, rtol=0, atol=bound + 1e-9, equal_nan=True):
            return f"{name} differs by {(a - b).abs().max().item():.2g}"
    return ""


def _randomised(module: nn.Module, seed: int) -> nn.Module:
    """Random weights, gates and output projections too: at zero they would hide what differs."""
    torch.default_generator.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point():
                weight.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5)
    return module


def _state(module: nn.Module) -> set[tuple[str, Any]]:
    """What a forward may leave on a module: values by name, tensors and objects by identity."""
    found: set[tuple[str, Any]] = set()
    for path, part in module.named_modules():
        for name, value in (vars(part) | part._buffers).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            found.add((f"{path}.{name}".lstrip("."), value if plain else id(value)))
    return found


def why_other_arguments(cls: type[nn.Module], fused: type[nn.Module]) -> str:
    """Why a forward of unknown source may be called as the fused one may not; empty if it may not."""
    names = {name: _RENAMED.get(name, name) for name in _arguments(cls)}
    ours = list(_arguments(fused))
    for place, (name, known) in enumerate(names.items()):
        if known not in ours:
            return f"its forward takes {name}, which is not known"
        positional = _arguments(cls)[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        if positional and ours.index(known) != place:
            return f"its forward takes {name} in another place"
    return ""


def _arguments(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    forward: Any = unwrapped(cls.forward)
    parameters = list(inspect.signature(forward).parameters.items())[1:]
    return {name: each for name, each in parameters if each.kind != inspect.Parameter.VAR_KEYWORD}
