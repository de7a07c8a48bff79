"""The CUDA kernels as nvcc compiles them for absent GPUs: nothing spilled, tensor cores used, quickly."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import test_stable_abi as abi
from tests.helpers import ROOT
from tests.helpers import cuda_binary as binary
from tests.helpers.cuda_binary import Kernel

USUAL = ("90",)
OTHERS = ("80", "100", "120")
LIMIT = 900  # seconds for the whole build: two cores take one minute of their own, but they may be shared
NVCC = os.environ.get("NVCC", "nvcc")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py is not beside the tests"),
    pytest.mark.skipif(shutil.which(NVCC) is None, reason=f"no {NVCC}"),
]

# How many blocks a multiprocessor must hold, by what their registers take; and the threads of a block.
BLOCKS = {
    r"attention_fwd_kernel<\w+, 64": 3,
    r"attention_bwd_rows_kernel<\w+, 64": 3,
    r"attention_\w+_kernel": 2,
    r"linear_fwd_kernel": 2,
    r"linear_norm_kernel": 4,
    r"gated_block_decode_attention_kernel<\w+, \d+, false|gated_block_decode_attention_kernel<float": 1,
    r"gated_block_decode_attention_kernel": 2,
    r"gated_block_decode_merge_kernel": 4,
    r"gated_residual_bwd_kernel<Mixed": 3,
    r"gated_residual_\w+_kernel": 4,
}
THREADS = {
    r"gated_block_decode_merge": 128,
    r"gated_block_decode_attention": 256,
    r"attention_\w+_kernel<float": 64,
    r"attention_": 128,
    r"": 256,
}
REGISTERS = 65536  # of a multiprocessor
# Kernels that move single numbers: sums of few columns, rows in no order, float32 where it is not fast.
NARROW = (
    "sum_partials_kernel",
    "masked_cross_attention_bwd_averaged_dv_kernel",
    "perceiver_attention_fwd_combine_kernel",
    "gated_block_decode_merge_kernel",
)


@functools.cache
def library(archs: tuple[str, ...] = USUAL) -> Path:
    """Builds the kernels, but for objects that an earlier run has made."""
    wanted = {"FLAMINGO_KERNELS_BUILD": "cuda-alone", "FLAMINGO_KERNELS_CUDA_ARCHS": ";".join(archs)}
    target = ROOT / "build" / f"cuda-for-tests-{'-'.join(archs)}"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(target)]
    environment = os.environ | wanted | {"FLAMINGO_KERNELS_EMULATE": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return target / "flamingo_kernels" / "_C_cuda.abi3.so"


@functools.cache
def kernels(arch: str) -> list[Kernel]:
    if binary.tool() is None:
        pytest.skip("no cuobjdump")
    return binary.kernels(library(USUAL if arch in USUAL else OTHERS), arch)


def first_match(table: dict[str, int], name: str) -> int:
    return next(value for pattern, value in table.items() if re.search(pattern, name))


def nothing_is_spilled(kernel: Kernel) -> bool:
    return kernel.stack == 0 and kernel.spills == 0


def enough_blocks_fit(kernel: Kernel) -> bool:
    if kernel.name.startswith(NARROW):
        return True
    allocated = -(-kernel.registers // 8) * 8
    return first_match(BLOCKS, kernel.name) * first_match(THREADS, kernel.name) * allocated <= REGISTERS


def tensor_cores_multiply(kernel: Kernel) -> bool:
    """But not in float32, whose products are exact."""
    multiplies = re.search(r"attention_(fwd|bwd_rows|bwd_keys)_kernel|linear_fwd", kernel.name) is not None
    return not multiplies or "float" in kernel.name or kernel.products > 0


def accesses_are_wide(kernel: Kernel) -> bool:
    """Where all rows are: a kernel of odd ones says `false`, one of mixed dtypes decides as it runs."""
    narrow = ", false" in kernel.name and re.match("gated|linear", kernel.name)
    if narrow or any(name in kernel.name for name in NARROW):
        return True
    decoding = kernel.name.startswith(("gated_block_decode", "linear"))  # few numbers leave them
    return kernel.wide_loads > 0 and (kernel.wide_stores > 0 or decoding or "float" in kernel.name)


CHECKS = (nothing_is_spilled, enough_blocks_fit, tensor_cores_multiply, accesses_are_wide)


@pytest.mark.parametrize(
    "arch",
    [*USUAL, *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)],
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_kernels(check, arch):
    found = kernels(arch)
    assert len(found) > 60
    assert [kernel for kernel in found if not check(kernel)] == []


def test_the_gates_can_fail():
    good = Kernel("masked_cross_attention_fwd_kernel<bf16, 64>", 168, 0, 0, 8, 1, 1)
    assert all(check(good) for check in CHECKS)
    bad = {"stack": 8, "spills": 1, "registers": 176, "products": 0, "wide_loads": 0, "wide_stores": 0}
    for field, value in bad.items():
        assert sum(not check(good._replace(**{field: value})) for check in CHECKS) == 1, field


def test_the_library_needs_only_the_stable_abi():
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    names = [line.split(None, 1)[1] for line in listed("-u").splitlines()]
    assert any(name.startswith("aoti_torch_get_current_cuda_stream") for name in names)
    assert [name for name in names if re.search(r"\b(c10|at|torch)::|^_?Py|^cu[A-Z]|^cuda[A-Z]", name)] == []
    exported = listed("--defined-only")
    assert "flamingo_kernels_cuda_build" in exported
    assert "flamingo_kernels::" not in exported


def test_the_library_finds_its_symbols():
    """In what it is linked to, or in what `_backends/cuda.py` opens before."""
    abi.assert_found(library(), {"libtorch_cpu.so", "libtorch_cuda.so"})


def test_beside_a_torch_for_cuda_it_loads(tmp_path):
    """Which loads its libraries privately; a stub with the symbols of the list may stand in for one."""
    torch = pytest.importorskip("torch")
    if (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        folder = ""  # torch's own
    else:
        symbols = [name for name, where in abi.oldest().items() if where == "libtorch_cuda.so"]
        source = "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in symbols)
        (tmp_path / "cuda.cpp").write_text(source)
        compiler = abi.load_setup().COMPILER
        command = [*compiler, "-shared", "-fPIC", tmp_path / "cuda.cpp", "-o", tmp_path / "libtorch_cuda.so"]
        subprocess.run(command, check=True)
        folder = f"cuda.TORCH_FOLDER = pathlib.Path({str(tmp_path)!r})\n"
    said = python(
        f"import pathlib\nfrom flamingo_kernels._backends import cuda\n{folder}print(cuda.why_not())"
    )
    assert said.strip() in ("there is no GPU that torch can use", "")


def listed(symbols: str) -> str:
    command = ["nm", "-DC", symbols, library()]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def python(code: str) -> str:
    environment = os.environ | {"FLAMINGO_KERNELS_CUDA_EXTENSION": str(library())}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_library_that_cannot_run_here_is_a_reason_and_loads_only_when_asked():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("it can run here")
    said = python(
        "import flamingo_kernels as fk; from flamingo_kernels._backends import cuda\n"
        "print(cuda._load.cache_info().misses)\n"
        "print(fk.available_backends('gated_residual')['cuda'])"
    ).splitlines()
    assert said[0] == "0"
    assert re.match(r"the CUDA kernels _C_cuda.abi3.so do not load: |there is no GPU", said[1])


def test_info_says_what_was_built():
    page = python("from flamingo_kernels.commands import info; print(info.render(info.collect()))")
    assert re.search(
        r"cuda extension .*_C_cuda\.abi3\.so, built .* \(nvcc [\d.]+; -std=c\+\+20 -O3 .*; ", page
    )
    assert f"sm_{', sm_'.join(USUAL)} and PTX of 90" in page
