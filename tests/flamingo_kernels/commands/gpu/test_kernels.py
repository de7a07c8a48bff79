"""The profiler's events become a row for every kernel."""

from __future__ import annotations

from flamingo_kernels.commands.bench.shapes import QUICK
from flamingo_kernels.commands.gpu import kernels

FACTS = {"registers per thread": 40, "shared memory": 1024, "grid": [8, 1, 1], "block": [128, 1, 1]}
(CASE,) = [case for case in QUICK if case.op == "gated_residual" and case.mode == "forward"]


def event(name, microseconds):
    return {"name": name, "dur": microseconds, "args": FACTS}


def test_a_row_for_every_kernel(monkeypatch):
    seen = [event("first", 3.0), event("second", 7.0), event("first", 5.0), event("first", 4.0)]
    monkeypatch.setattr(kernels, "_events", lambda *_: seen)
    first, second = kernels.by_kernel(CASE, "reference", "cpu")
    assert (first["kernel"], first["launches"], first["microseconds"]) == ("first", 3.0, 4.0)
    assert (second["kernel"], second["launches"], second["microseconds"]) == ("second", 1.0, 7.0)
    assert (first["registers"], first["shared_bytes"], first["grid"]) == (40, 1024, [8, 1, 1])
    assert (first["op"], first["backend"]) == ("gated_residual", "reference")


def test_a_profiler_that_may_not_look_gives_no_row(monkeypatch):
    monkeypatch.setattr(kernels, "_events", lambda *_: [])
    assert kernels.by_kernel(CASE, "reference", "cpu") == []


def test_what_torch_does_on_a_cpu_is_seen():
    found = kernels.by_kernel(CASE, "reference", "cpu")
    assert "aten::tanh" in {each["kernel"] for each in found}
