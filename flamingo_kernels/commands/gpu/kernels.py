"""The time of every kernel within a call, by torch's profiler, on whatever is in the caches."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..._backends import dispatch
from ..bench.baselines import OURS, contenders
from ..bench.run import Call, call_of
from ..bench.shapes import Case
from ..info import conditions_on

CALLS = 10
# As CUPTI names them: what a kernel was compiled to and launched with.
_FACTS = {
    "registers": "registers per thread",
    "shared_bytes": "shared memory",
    "grid": "grid",
    "block": "block",
    "blocks_per_sm": "blocks per SM",
}


def by_kernel(case: Case, backend: str, device: str) -> list[dict[str, Any]]:
    """A row for every kernel of a call of ours by one backend, the first to run first.

    No row where the profiler may not look at the GPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    calls = CALLS if on_gpu else 1
    with dispatch.use_backend(backend):
        call = call_of(contenders(case, device=device)[OURS](), case.mode)
        call()
        events = _events(call, calls, on_gpu)
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        found.setdefault(event["name"], []).append(event)
    called = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "mode": case.mode, "backend": backend}
    called |= conditions_on(device)
    return [called | _row(name, each, calls) for name, each in found.items()]


def _row(name: str, events: list[dict[str, Any]], calls: int) -> dict[str, Any]:
    facts = {ours: events[0].get("args", {}).get(theirs) for ours, theirs in _FACTS.items()}
    time = statistics.median(event["dur"] for event in events)
    return {"kernel": name, "launches": len(events) / calls, "microseconds": time} | facts


def _events(call: Call, calls: int, on_gpu: bool) -> list[dict[str, Any]]:
    """What ran; on a cpu, which has no kernels, torch's operators."""
    activity, kind = (ProfilerActivity.CUDA, "kernel") if on_gpu else (ProfilerActivity.CPU, "cpu_op")
    with profile(activities=[activity]) as profiled:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return sorted((each for each in events if each.get("cat") == kind), key=lambda event: event["ts"])
