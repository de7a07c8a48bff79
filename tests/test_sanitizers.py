"""Sanitizers report a fault that changes no result; `make sanitize` sees that they are silent without."""

from __future__ import annotations

import shlex
import shutil

import pytest

from tests.helpers import ROOT
from tests.helpers.scratch import Scratch
from tests.mutations.faults import Fault
from tests.mutations.plant import plant
from tests.sanitizers import SANITIZERS, compiler, preloaded, run

pytestmark = pytest.mark.slow

# By sanitizer: a fault that changes no result, and what is reported of it.
HARMLESS = {
    "address": (
        Fault(
            "sanitizers",
            "csrc/cpu/simd.h",
            "the last elements of a row are read with what lies behind them, which is then dropped",
            "Floats load(const T* from, int64_t count) {",
            "Floats load(const T* from, int64_t count) { return keep_first(load(from), count, 0.f);",
            ("tests/flamingo_kernels/ops/test_gated_residual.py",),
            only="cpu",
        ),
        "AddressSanitizer",
    ),
    "undefined": (
        Fault(
            "sanitizers",
            "csrc/cpu/simd.h",
            "what a NaN would be rounded to overflows, and is then dropped",
            "Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
            "Bits rounded = (Bits)((Ints)bits + 0x7fff + (Ints)((bits >> 16) & 1)) >> 16;",
            ("tests/flamingo_kernels/ops/test_cpu_arithmetic.py",),
            only="nan_is_rounded",
        ),
        "signed integer overflow",
    ),
    "thread": (
        Fault(
            "sanitizers",
            "csrc/cpu/bindings.cpp",
            "all threads write to one place, which nothing reads",
            "    for (int64_t first; (first",
            "    static volatile int64_t latest;\n    latest = thread;\n    for (int64_t first; (first",
            ("tests/flamingo_kernels/ops/test_gated_residual.py",),
            only="cpu and oracle and 257",
        ),
        "data race",
    ),
}


@pytest.fixture
def scratch(tmp_path):
    if not shutil.which(shlex.split(compiler())[0]) or not (ROOT / "setup.py").exists():
        pytest.skip("no compiler, or no setup.py beside the tests")
    return Scratch(ROOT, tmp_path / "copy")


@pytest.mark.parametrize("name", HARMLESS)
def test_a_fault_that_changes_no_result_is_reported(name, scratch):
    try:
        preloaded(SANITIZERS[name])
    except RuntimeError as error:
        pytest.skip(str(error))
    fault, report = HARMLESS[name]
    verdict = plant(scratch, fault)
    assert verdict.outcome == "survived", verdict
    with scratch.edited(fault.path, fault.planted((scratch.folder / fault.path).read_text())):
        _, reports = run(scratch, SANITIZERS[name], *fault.tests, "-k", fault.only)
    assert any(report in each for each in reports), reports
