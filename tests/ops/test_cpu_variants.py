"""Each instruction set's kernels against float64, those this processor lacks in emulation.

The other tests run the set that the library chooses here. This one runs the rest: as they are shipped where
this processor has their instructions, else compiled for it from the same source (FLAMINGO_KERNELS_EMULATE=1).
"""

from __future__ import annotations

import platform

import pytest

from flamingo_kernels import _env, _extension

from .build import ROOT, build_extension, run_tests

FILES = [
    f"tests/ops/test_{name}.py"
    for name in ("masked_cross_attention", "perceiver_attention", "gated_residual", "gated_residual_norm")
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{platform.machine()} has the portable variant only")
    return str(build_extension(ROOT, tmp_path_factory.mktemp("emulated"), FLAMINGO_KERNELS_EMULATE="1"))


@pytest.mark.parametrize("variant", _env.CPU_VARIANTS)
def test_variant(variant, compiled, request):
    if variant == _extension.cpu_variant():
        pytest.skip(f"the other tests run {variant}")
    environment = {"FLAMINGO_KERNELS_CPU_VARIANT": variant}
    if variant not in _extension.cpu_variants():
        environment["FLAMINGO_KERNELS_EXTENSION"] = request.getfixturevalue("emulated")
    status, output = run_tests(*FILES, "-k", "cpu and (test_oracle or nan) and not mixed", **environment)
    assert status == 0, output
    assert "skipped" not in output.splitlines()[-1], output
