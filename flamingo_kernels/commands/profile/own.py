"""The user's own model as a subject: `profile --model FILE.py:NAME` or `module:NAME`.

NAME is a function of any of `tokens`, `images` and `batch`. It returns the model and a dict of the keyword
arguments of its forward, or a `Subject` where more is to be said. The forward returns logits, or something
that has them as `logits` or as its first tensor, and may have a `loss`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.user_function import user_function, users_code

from ..measure.swapped import swapped
from .parts import BLOCKS, RESAMPLER, VISION
from .run import twin
from .subject import DECODE, PREFILL, STEP, Plan, Sizes, Subject, Work


def plan(where: str, sizes: Sizes) -> Plan:
    """How to build the model of a function.

    Args:
        where: its file or module, and its name, as "mine.py:build".

    Raises:
        ImportError, ValueError: there is no such function, see `user_function`.
    """
    user_function(where)
    return Plan(where, sizes, partial(_build, where), needs_memory=True)


def _build(where: str, sizes: Sizes) -> Subject:
    make = user_function(where)
    offered = {"tokens": sizes.text, "images": sizes.media, "batch": sizes.batch}
    with users_code(where):
        made = make(**{each: offered[each] for each in inspect.signature(make).parameters if each in offered})
    if isinstance(made, Subject):
        return made
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], Mapping)
    ):
        kinds = made if isinstance(made, tuple) else (made,)
        raise ValueError(
            f"expected {where} to return a model and a dict of inputs, got "
            f"{', '.join(type(each).__name__ for each in kinds) or 'an empty tuple'}."
        )
    model, inputs = made
    model.eval()
    tokens = _tokens(inputs, sizes)
    works = {PREFILL: Work(partial(_prefill, inputs), tokens)}
    if any(parameter.requires_grad for parameter in model.parameters()):
        note = "forward and backward of its loss, or of the mean square of its logits; no optimizer"
        works[STEP] = Work(partial(_step, inputs), tokens, note)
    if _generates(model, inputs):
        note = "the second token of its own generate, called again"
        works[DECODE] = Work(partial(_decode, inputs), sizes.batch, note)
    return Subject(model, _tensors(inputs), _parts(model), works)


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: each for name, each in inputs.items() if isinstance(each, Tensor)}


def _tokens(inputs: Mapping[str, Any], sizes: Sizes) -> int:
    """How many tokens of text there are: those of the first matrix of whole numbers."""
    found = (each for each in _tensors(inputs).values() if each.dtype == torch.int64 and each.ndim == 2)
    return next((each.numel() for each in found), sizes.batch * sizes.text)


def _parts(model: nn.Module) -> dict[str, str]:
    """What `patch` swaps are its blocks and resamplers; what is called vision is that."""
    report = swapped(twin(model))
    found = {r"(.*\.)?vision[^.]*": VISION}
    for path, (original, _) in report.replaced.items():
        if not any(path.startswith(f"{outer}.") for outer in report.replaced):
            resampler = re.search("Perceiver|Resampler", original.__name__)
            found[re.escape(path)] = RESAMPLER if resampler else BLOCKS
    return found


def _cast(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    cast = {name: each.to(dtype) for name, each in _tensors(inputs).items() if each.is_floating_point()}
    return {**inputs, **cast}


def _prefill(inputs: Mapping[str, Any], model: nn.Module) -> Callable[[], Tensor]:
    given = _cast(inputs, model)
    return lambda: _logits(model(**given))


def _step(inputs: Mapping[str, Any], model: nn.Module) -> Callable[[], Tensor]:
    given = _cast(inputs, model)

    def loss() -> Tensor:
        output = model(**given)
        found = getattr(output, "loss", None)
        return _logits(output).float().square().mean() if found is None else found

    return loss


def _logits(output: Any) -> Tensor:
    """What a forward returns, or the logits in it, or the first tensor of it."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return next(each for each in output if isinstance(each, Tensor)) if found is None else found


def _generates(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether generate calls the model itself, by keywords and with a cache, for every token."""
    try:
        with torch.no_grad():
            again, _ = _second_call(model, inputs)
    except Exception:  # it takes other inputs than forward, or there is no generate
        return False
    return bool(_layers(again))


def _second_call(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """What generate calls the model with for the second token, and the lengths in its cache before."""
    given = {name: each for name, each in _cast(inputs, model).items() if name != "labels"}
    calls = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((dict(kwargs), [layer.get_seq_length() for layer in _layers(kwargs)]))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    finally:
        hook.remove()
    return calls[1]


def _layers(given: Mapping[str, Any]) -> list[Any]:
    """The layers of the cache that a model is called with."""
    cache = given.get("cache", given.get("past_key_values"))  # transformers before 5.24 had the second name
    return list(getattr(cache, "layers", []))


def _decode(inputs: Mapping[str, Any], model: Any) -> Callable[[], Tensor]:
    """A call for the second token, which crops the cache again."""
    again, lengths = _second_call(model, inputs)

    def crop() -> None:
        for layer, length in zip(_layers(again), lengths, strict=True):
            if layer.get_seq_length() > length:  # not the keys of images
                layer.crop(-1)

    def token() -> Tensor:
        logits = _logits(model(**again))
        crop()
        return logits

    crop()  # what generate itself has added
    return token
