"""Keeps a trial from the rest of the program: its settings, its random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def apart() -> Iterator[None]:
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


def set_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)


def drawn() -> tuple[Any, ...]:
    """What differs if random numbers were drawn since the seed was set."""
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy and numpy.random.get_state()[2]
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), of_numpy
