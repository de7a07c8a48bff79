"""The compiled kernels, for absent GPUs: nothing spilled, room enough, tensor cores used, wide accesses."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.helpers import ROOT, slow_unless
from tests.helpers.triton.cases import TARGETS

pytest.importorskip("triton", reason="the Triton backend is optional")

OLDEST = Path(sys.prefix) / "triton-oldest"  # the Triton of torch 2.10 and 2.11; `make test` installs it
DOTS = ("masked_cross_attention", "perceiver_attention", "linear", "gated_block_decode")
# The kernels around the products: they add or average what others made, or norm it.
WITHOUT_DOTS = (
    "_gated_block_decode_fwd_merge_kernel",
    "_gated_block_decode_fwd_norm_kernel",
    "_masked_xattn_bwd_averages_kernel",
    "_perceiver_fwd_combine_kernel",
    "_sum_kernel",
    "_sum_many_kernel",
)


@functools.cache
def compiled(target: str, group: str, triton: Path | None = None) -> list[dict]:
    """What `tests.helpers.triton.compile` says, with this environment's Triton or another."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = str(triton)
    command = [sys.executable, "-m", "tests.helpers.triton.compile", target, group]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(binary: dict) -> str:
    return f"{binary['kernel']} {binary['constants']} of {binary['case']}"


USUAL = (("sm_90", "usual"),)


@pytest.mark.parametrize(
    ("target", "group"),
    slow_unless(USUAL, product(TARGETS, ("usual", "rest"))),
)
def test_what_is_launched(group, target):
    binaries = compiled(target, group)
    assert len(binaries) > 20
    for check in (nothing_is_spilled, a_program_fits, dots_use_the_matrix_units, accesses_are_wide):
        failed = [f"{name(binary)}: {binary}" for binary in binaries if not check(binary, target)]
        assert not failed, f"{check.__name__} on {target}:\n" + "\n".join(failed)


def nothing_is_spilled(binary: dict, target: str) -> bool:
    """Where the registers are capped, what a loop only reads may be put aside before it."""
    return binary["spilled_in_loops" if "maxnreg" in binary["constants"] else "spilled"] == 0


def a_program_fits(binary: dict, target: str) -> bool:
    return binary["shared"] <= TARGETS[target].shared_memory


def dots_use_the_matrix_units(binary: dict, target: str) -> bool:
    """But not in float32, whose products are exact."""
    operator = binary["case"].split(":")[0]
    if operator not in DOTS or binary["kernel"] in WITHOUT_DOTS or "float16" not in binary["case"]:
        return True
    return binary["matrix"] > 0


def accesses_are_wide(binary: dict, target: str) -> bool:
    """Most of the loads and stores move 16 bytes a thread; what is left are gates, spans and sums.

    On AMD a thread has 4 numbers of a row of a product, so its stores of 16-bit numbers move 8 bytes; few
    rows of a linear layer leave a thread as few.
    """
    if binary["kernel"] in WITHOUT_DOTS or "63)" in binary["case"]:
        return True
    narrow = target == "gfx942" or binary["kernel"] == "_linear_fwd_kernel"
    return binary["wide_loads"] > 0 and (binary["wide_stores"] > 0 or narrow)


# For gfx942 Triton 3.6 fails an assertion on `load_keys` of perceiver attention, in ConvertToBufferOps.
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_the_oldest_triton_compiles_the_same_source(target):
    if not OLDEST.exists():
        fail = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        fail(f"{OLDEST} is not there: make .venv/triton-oldest")
    binaries = compiled(target, "usual", OLDEST)
    assert len(binaries) > 20
    assert all(a_program_fits(binary, target) for binary in binaries)
    assert all(dots_use_the_matrix_units(binary, target) for binary in binaries)


def test_the_gates_can_fail():
    good = {
        "case": "masked_cross_attention: dtype=bfloat16",
        "kernel": "_masked_xattn_bwd_one_shot_kernel",
        "constants": {},
        **{"spilled": 0, "spilled_in_loops": 0, "shared": 1, "matrix": 8, "wide_loads": 1, "wide_stores": 1},
    }
    for check, bad in (
        (nothing_is_spilled, {"spilled": 1}),
        (nothing_is_spilled, {"spilled_in_loops": 1, "constants": {"maxnreg": 168}}),
        (a_program_fits, {"shared": 228 * 1024}),
        (dots_use_the_matrix_units, {"matrix": 0}),
        (accesses_are_wide, {"wide_loads": 0}),
        (accesses_are_wide, {"wide_stores": 0}),
    ):
        assert check(good, "sm_90")
        assert not check(good | bad, "sm_90")
    assert accesses_are_wide(good | {"wide_stores": 0}, "gfx942")
    assert nothing_is_spilled(good | {"spilled": 1, "constants": {"maxnreg": 168}}, "sm_90")
