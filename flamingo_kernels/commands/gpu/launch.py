"""What a call costs the host: checking it and putting its kernels on a stream. A CUDA graph spares that."""

from __future__ import annotations

import time

import torch

from ...testing import Case
from .proofs import Call

CALLS, ROUNDS = 50, 5  # far fewer launches than a stream takes before it makes the host wait


def host_microseconds(case: Case, backend: str) -> float:
    """Microseconds of one forward call, in the fastest of a few rounds; on a cpu those of a whole call."""
    call = Call(case, backend).forward
    calls, rounds = (CALLS, ROUNDS) if torch.device(case.device).type == "cuda" else (1, 1)
    taken = []
    for _ in range(rounds + 1):  # the first compiles and allocates
        _wait(case.device)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append(time.perf_counter() - began)
    _wait(case.device)
    return 1e6 * min(taken[1:]) / calls


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
