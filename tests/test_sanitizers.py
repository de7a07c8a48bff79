"""Each sanitizer is silent about the kernels, and reports a fault that changes no result."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest

from tests.helpers import ROOT
from tests.helpers.scratch import PASSED, Scratch
from tests.sanitizers import SANITIZERS, compiler, preloaded, run

pytestmark = pytest.mark.slow

HARMLESS = {
    "address": (
        "csrc/cpu/bindings.cpp",
        "(count * sizeof(T) + 63) / 64 * 64 + 64;",
        "(count * sizeof(T) + 63) / 64 * 64;",  # kernels may read a line behind their memory
        "test_masked_cross_attention.py",
        "heap-buffer-overflow",
    ),
    "undefined": (
        "csrc/cpu/simd.h",
        "(Floats)(((Bits)shifted << 23) + 0x3f800000);",
        "(Floats)((Ints)((Bits)shifted << 23) + 0x3f800000);",  # it overflows in lanes that nobody reads
        "test_saturated.py",
        "signed integer overflow",
    ),
    "thread": (
        "csrc/cpu/bindings.cpp",
        "std::atomic<int64_t> next{0};",
        # two threads may do the same task, and write the same
        "struct { int64_t n; int64_t fetch_add(int64_t few) { return (n += few) - few; } } next{0};",
        "test_every_operator.py",
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
    path, before, after, file, report = HARMLESS[name]
    text = (scratch.folder / path).read_text()
    assert text.count(before) == 1, f"{path} has changed: point this test at its place again"
    tests = f"tests/flamingo_kernels/ops/{file}", "-k", "cpu or threads"
    with scratch.edited(path, text.replace(before, after)):
        with scratch.compiled(cpu=True, cuda=False) as kernels:
            assert scratch.test(*tests, **os.environ | kernels).status == PASSED
        _, reports = run(scratch, SANITIZERS[name], *tests)
    assert any(report in each for each in reports), reports
