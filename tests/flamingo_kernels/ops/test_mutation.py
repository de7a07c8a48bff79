"""The tests can fail: with one comparison of the C++ mask flipped, the oracle refuses the kernels."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.build import ROOT, build_extension, run_tests

pytestmark = pytest.mark.slow

SOURCE = "csrc/cpu/masked_cross_attention.h"
FLIPS = {
    "the medium after the last": ("m < params.hi[", "m <= params.hi["),
    "not the first medium": ("params.lo[b * params.length + t] <= m", "params.lo[b * params.length + t] < m"),
    "averaging rows return zero": ("params.hi[b * params.length + t] < 0;", "false;"),
    # only poisoned memory gives this one away
    "rows that see nothing get no gradient written": (
        "if (!params.immediate || fully_masked(",
        "if (!params.immediate && fully_masked(",
    ),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_comparison_fails(flip, compiled, tmp_path):
    before, after = FLIPS[flip]
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("csrc", "flamingo_kernels", "flamingo"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    text = (clone / SOURCE).read_text()
    assert text.count(before) == 1, f"{SOURCE} has changed: point this test at its mask again"
    (clone / SOURCE).write_text(text.replace(before, after))
    extension = build_extension(clone, tmp_path / "flipped")

    tests = (
        "tests/flamingo_kernels/ops/test_masked_cross_attention.py",
        "-k",
        "cpu and test_oracle and (default or jumps)",
    )
    status, output = run_tests(*tests, FLAMINGO_KERNELS_EXTENSION=str(extension))
    assert status == 1, output
    assert "error budget exceeded: masked_cross_attention, cpu" in output
