"""Instruction sets that this processor lacks, against float64.

The other tests run those that it has. This one compiles the rest for it from the same source
(FLAMINGO_KERNELS_EMULATE=1).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flamingo_kernels import perceiver_attention
from flamingo_kernels._backends import cpu, env
from tests.helpers.build import ROOT, build_extension, run_tests

FILES = [
    f"tests/flamingo_kernels/ops/test_{name}.py"
    for name in (
        "masked_cross_attention",
        "perceiver_attention",
        "gated_residual",
        "linear",
    )
]

# A digest of every output and gradient of both attentions.
DIGESTS = """
from dataclasses import replace
from hashlib import sha256
import torch
from flamingo_kernels._backends import cpu
from flamingo_kernels.testing import evaluate
from tests.flamingo_kernels.ops import test_masked_cross_attention, test_perceiver_attention

for case in test_masked_cross_attention.CASES + test_perceiver_attention.CASES:
    case = replace(case, dtype=torch.bfloat16)
    tensors = case.tensors()
    douts = case.douts(case.eager(**tensors))
    found = evaluate(case, lambda **t: case.kernel("cpu", **t), tensors, douts)
    for name, tensor in found.items():
        bits = tensor.contiguous().view(torch.int16).numpy().tobytes()
        print(case, name, tuple(tensor.shape), sha256(bits).hexdigest())
assert cpu.cpu_variant() == "avx512_amx"
"""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{platform.machine()} has the portable variant only")
    return str(build_extension(ROOT, tmp_path_factory.mktemp("emulated"), FLAMINGO_KERNELS_EMULATE="1"))


LACKING = [variant for variant in env.CPU_VARIANTS if variant not in cpu.cpu_variants()]
HALF = "(float16 and not bfloat16)"  # converted as float32 is stored, and then computed like it


def test_the_sets_that_this_processor_lacks(compiled, request):
    if not LACKING:
        pytest.skip("this processor has all, and the other tests run them")
    status, output = run_tests(
        *FILES,
        "-k",
        f"({' or '.join(LACKING)}) and (oracle or nan or key or scores) and not mixed and not {HALF}",
        FLAMINGO_KERNELS_CPU_VARIANT=cpu.cpu_variant(),
        FLAMINGO_KERNELS_EXTENSION=request.getfixturevalue("emulated"),
    )
    assert status == 0, output
    assert "skipped" not in output.splitlines()[-1], output


def needs_tiles():
    if "avx512_amx" not in cpu.cpu_variants():
        pytest.skip("no tile registers here")


def digests(**environment: str) -> list[str]:
    environment |= {"FLAMINGO_KERNELS_CPU_VARIANT": "avx512_amx", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_emulated_tiles_are_the_processors_to_the_last_bit(request):
    """What the emulation proves of tiles on other machines is true of the real ones."""
    needs_tiles()
    real = digests()
    assert len(real) > 300
    assert digests(FLAMINGO_KERNELS_EXTENSION=request.getfixturevalue("emulated")) == real


@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_and_torch_take_turns(threads):
    """Both configure the tile registers of the same threads, each for itself."""
    if cpu.cpu_variant() != "avx512_amx":
        pytest.skip("the kernels run without tile registers here")
    torch.manual_seed(0)
    dtype = torch.bfloat16
    a, b = torch.randn(300, 500, dtype=dtype), torch.randn(500, 300, dtype=dtype)
    q, latents = torch.randn(2, 2, 64, 8, 64, dtype=dtype)
    media = torch.randn(2, 256, 8, 64, dtype=dtype)

    def torchs():
        return a @ b, scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, media, media)))

    def ours():
        return perceiver_attention(q, media, media, latents, latents, backend="cpu")

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected, expected_ours = torchs(), ours()
        for _ in range(20):
            assert all(map(torch.equal, torchs(), expected))
            assert torch.equal(ours(), expected_ours)
    finally:
        torch.set_num_threads(before)
