"""What is measured in one task, in a process of the crew."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..._backends import dispatch, env
from ..bench.floors import Ceilings, ceilings
from ..bench.rows import Run
from ..bench.run import run
from ..bench.shapes import Case
from ..measure.timing import Clock
from . import configs, kernels
from .launch import host_microseconds
from .proofs import Task

Rows = list[dict[str, Any]]


def _on(device: str) -> AbstractContextManager[None]:
    """What holds for every measurement: no tf32, and Triton by name where its interpreter is on, as `auto`
    never takes that.
    """
    torch.set_float32_matmul_precision("highest")
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    return dispatch.use_backend("triton") if env.INTERPRET else nullcontext()


def floors(device: str, *, clock: Clock | None) -> Ceilings:
    with _on(device):
        return ceilings(device, clock)


def time(case: Case, *, device: str, **options: Any) -> Run:
    with _on(device):
        return run([case], device=device, **options)


def host(task: Task) -> float:
    with _on(task.case.device):
        return host_microseconds(task.case, task.backend)


def compile_configs(task: tuple[Case, str], *, device: str) -> None:
    with _on(device):
        configs.compile_all(task[0], device)


def time_configs(task: tuple[Case, str], *, device: str, clock: Clock | None) -> Rows:
    with _on(device):
        return configs.time_all(task[0], device, clock)


def profile(task: tuple[Case, str], *, device: str) -> Rows:
    with _on(device):
        return kernels.by_kernel(*task, device)
