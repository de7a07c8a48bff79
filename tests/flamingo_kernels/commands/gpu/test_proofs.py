"""What each proof finds: in a right kernel nothing, in a wrong one its fault. Streams, graphs are stubs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from flamingo_kernels._backends import dispatch
from flamingo_kernels.commands.gpu import proofs
from flamingo_kernels.commands.gpu.plan import LARGE
from flamingo_kernels.commands.gpu.proofs import PROOFS, Call, Finding, Task, far, perform
from flamingo_kernels.ops.gated_residual import reference
from flamingo_kernels.testing import (
    CASES,
    GatedBlockDecodeCase,
    GatedResidualCase,
    LinearCase,
    MaskedCrossAttentionCase,
    PerceiverAttentionCase,
)

SMALL = [
    MaskedCrossAttentionCase(length=9, latents=3, heads=1, policy="open_flamingo", layout="slice"),
    PerceiverAttentionCase(features=5, latents=2, queries=3, heads=1, lengths=(3, 5)),
    GatedResidualCase(shape=(3, 40)),
    GatedBlockDecodeCase(dim=8, hidden=9, heads=1),
    LinearCase(rows=(2,), width=5, out=3),
]
GATED = SMALL[2]


def record(call, device):
    """A graph of a cpu: replayed, the call is made again and its results go where the first ones went."""
    results = call()

    def replay():
        for place, value in zip(leaves(results), leaves(call()), strict=True):
            place.copy_(value)

    return results, replay


def leaves(results):
    return results.values() if isinstance(results, dict) else results


@contextmanager
def somewhere(device):
    yield


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(proofs, "capture", record)
    monkeypatch.setattr(proofs, "a_stream", somewhere)
    monkeypatch.setattr(proofs, "elsewhere", somewhere)
    monkeypatch.setattr(proofs, "FAR", 1000)


def plant(monkeypatch, wrong):
    monkeypatch.setattr(reference, "gated_residual", wrong)


def found(proof, case=GATED, backend="reference"):
    return perform(Task(proof, case, backend))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.operator)
def test_a_right_kernel_passes_every_proof(stubs, backend, case):
    if backend not in dispatch.limits(case.operator):
        pytest.skip(f"{case.operator} has no {backend} kernel")
    unproved = set() if case.operator in {each.operator for each in LARGE} else {"past 2^31 elements"}
    for proof in PROOFS.keys() - unproved:
        result = found(proof, case, backend)
        assert (result.status, result.detail) == ("ok", ""), proof
        assert result.check == proof
        assert (result.operator, result.dtype, result.case) == (case.operator, "float32", str(case))


def test_accuracy_is_shown_where_it_is_what_was_proved(stubs):
    result = found("parity")
    assert 0 < result.error <= result.budget
    assert result.spent == result.error / result.budget
    assert found("repeats").error is None


def test_a_wrong_kernel_fails_parity(monkeypatch):
    plant(monkeypatch, lambda x, y, gate: x + torch.tanh(gate) * y * 1.01)
    result = found("parity")
    assert result.status == "failed"
    assert result.error > result.budget
    assert result.spent > 1


def test_a_nan_fails_parity(monkeypatch):
    plant(monkeypatch, lambda x, y, gate: x + torch.tanh(gate) * y * torch.nan)
    assert found("parity").status == "failed"


def test_memory_left_unwritten_fails_parity(monkeypatch):
    def lazy(x, y, gate):
        out = torch.ops.aten.empty_like(x)  # past the fixture that fills memory in all tests
        return torch.cat([(x + torch.tanh(gate) * y)[1:], out[:1] + 0 * x[:1]])

    plant(monkeypatch, lazy)
    assert found("parity").status == "failed"
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_kernel_raises_is_its_failure(monkeypatch):
    def broken(x, y, gate):
        raise RuntimeError("out of resource: shared memory\nand a long story")

    plant(monkeypatch, broken)
    result = found("parity")
    assert (result.status, result.detail) == ("failed", "RuntimeError: out of resource: shared memory")


def test_inputs_that_a_backend_refuses_are_skipped(compiled):
    result = found("parity", GatedResidualCase(dtype=torch.float64), compiled)
    assert result.status == "skipped"
    assert "dtype torch.float64 is not one of" in result.detail


def restless(monkeypatch, step=1e-6):
    """A kernel whose results are a little more at every call."""
    calls = iter(range(1000))
    plant(monkeypatch, lambda x, y, gate: x + torch.tanh(gate) * y + step * next(calls))


@pytest.mark.parametrize("proof", ["repeats", "another stream", "another device", "graph"])
def test_other_bits_are_found(stubs, monkeypatch, proof):
    restless(monkeypatch, step=0)
    assert found(proof).status == "ok"
    restless(monkeypatch)
    result = found(proof)
    assert (result.status, result.detail) == ("failed", "AssertionError: out is not the same to the last bit")


def test_a_graph_that_reads_old_inputs_is_found(stubs, monkeypatch):
    def deaf(call, device):
        results = call()
        kept = [tensor.clone() for tensor in leaves(results)]
        return results, lambda: [place.copy_(old) for place, old in zip(leaves(results), kept, strict=True)]

    monkeypatch.setattr(proofs, "capture", deaf)
    for case in SMALL:
        assert "is not the same" in found("graph", case).detail


def test_a_graph_that_writes_nothing_is_found(stubs, monkeypatch):
    monkeypatch.setattr(proofs, "capture", lambda call, device: (call(), lambda: None))
    assert "out is not the same" in found("graph").detail


def test_nan_is_the_same_as_nan_alone():
    nan, zero = {"out": torch.tensor([torch.nan, 1])}, {"out": torch.tensor([0.0, 1])}
    proofs.expect_same(nan, {"out": nan["out"].clone()})
    for one, other in ((nan, zero), (zero, nan)):
        with pytest.raises(AssertionError, match="out is not the same to the last bit"):
            proofs.expect_same(one, other)


def test_a_call_takes_over_all_that_another_reads():
    for case in SMALL:
        one, other = Call(case, "reference"), Call(replace(case, seed=5), "reference")
        proofs.expect_same(other.both(), other.both())
        with pytest.raises(AssertionError):
            proofs.expect_same(one.both(), other.both())
        one.read(other)
        proofs.expect_same(one.both(), other.both())


def test_the_end_of_a_large_tensor_is_looked_at(monkeypatch):
    shapes = []

    def near_sighted(x, y, gate):
        shapes.append(tuple(x.shape))
        seen = torch.arange(x.shape[0], device=x.device)[:, None] < 20  # as if offsets ended there
        return torch.where(seen, x + torch.tanh(gate) * y, x)

    plant(monkeypatch, near_sighted)
    for elements, passed in ((300, True), (1000, False)):
        monkeypatch.setattr(proofs, "FAR", elements)
        assert far(GATED, "reference").passed is passed
        assert shapes[-1] == ((elements // 120 + 2) * 3, 40)


def test_a_cpu_has_neither_streams_nor_graphs():
    results = [found(proof) for proof in ("another stream", "another device", "graph")]
    assert {each.check: each.detail for each in results if each.status == "skipped"} == {
        "another stream": "a cpu has no streams",
        "another device": "there is no second GPU",
        "graph": "a cpu has no graphs",
    }


def test_a_finding_can_be_stored():
    result = Task("parity", GATED, "reference").finding("late", "no time was left")
    assert Finding(**vars(result)) == result


def test_all_operators_are_in_these_tests():
    assert {case.operator for case in SMALL} == set(CASES)
