"""Every configuration that a Triton kernel may be launched with: its time, and what it was compiled to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..._backends import dispatch, env
from ..bench.baselines import OURS, contenders
from ..bench.shapes import Case
from ..info import conditions_on
from ..measure.text import first_line
from ..measure.timing import Clock, Spread, clock_of, interleave

SECONDS_EACH = 0.04  # to time a configuration
Row = dict[str, Any]


def compile_all(case: Case, device: str) -> None:
    """Launch every kernel of a call, forward and backward, in every way: what is compiled is kept on disk."""

    def choose(kernel: Any, choice: Any, run: Callable[[Any], Any], where: torch.device) -> Any:
        for config in choice.candidates:
            _launch(run, config)
        return choice.default

    with _choosing(choose):
        _call(case, device)


def time_all(case: Case, device: str, clock: Clock | None = None) -> list[Row]:
    """A row for every configuration of every kernel of a call; `default` marks the one that is taken."""
    rows: list[Row] = []
    keeps_time = clock or clock_of(device)

    def choose(kernel: Any, choice: Any, run: Callable[[Any], Any], where: torch.device) -> Any:
        for config, facts in _facts(choice.candidates, run, keeps_time).items():
            named = {"kernel": kernel.__name__, "config": dataclasses.asdict(config)}
            rows.append(named | {"default": config == choice.default} | facts)
        return choice.default

    with _choosing(choose):
        _call(case, device)
    called = {"op": case.op, "shape": case.shape, "dtype": case.dtype} | conditions_on(device)
    return [called | row for row in rows]


def _facts(configs: tuple[Any, ...], run: Callable[[Any], Any], clock: Clock) -> dict[Any, Row]:
    """What each configuration was compiled to and its time, or why it does not run."""
    found = {config: _launch(run, config) for config in configs}
    calls = {repr(config): partial(run, config) for config, facts in found.items() if "error" not in facts}
    spreads = interleave(calls, seconds=SECONDS_EACH * len(calls), clock=clock) if calls else {}
    times = {name: _milliseconds(spread) for name, spread in spreads.items()}
    return {config: facts | times.get(repr(config), {}) for config, facts in found.items()}


def _milliseconds(spread: Spread) -> Row:
    return {f"{name}_ms": each for name, each in spread._asdict().items()}


def _launch(run: Callable[[Any], Any], config: Any) -> Row:
    try:
        compiled = run(config)
    except Exception as error:  # it takes more of the device than there is: a fact like the others
        return {"error": first_line(error)}
    return {
        "registers": getattr(compiled, "n_regs", None),  # the interpreter has none
        "spills": getattr(compiled, "n_spills", None),
        "shared_bytes": getattr(getattr(compiled, "metadata", None), "shared", None),
    }


@contextmanager
def _choosing(choose: Callable[..., Any]) -> Iterator[None]:
    """Within the block a function chooses the configuration of every launch, as tuning would."""
    from ..._backends.triton import tuning

    before = env.AUTOTUNE, tuning.choose
    env.AUTOTUNE, tuning.choose = True, choose
    try:
        with dispatch.use_backend("triton"):
            yield
    finally:
        env.AUTOTUNE, tuning.choose = before


def _call(case: Case, device: str) -> None:
    """Ours once, forward and backward."""
    ours = contenders(case, device=device)[OURS]()
    outputs = ours.call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, ours.wrt, [torch.ones_like(each) for each in outputs])
