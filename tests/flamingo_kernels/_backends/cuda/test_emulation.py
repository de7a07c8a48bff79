"""The emulation of CUDA on a processor: right kernels run, and every planted mistake is noticed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

SOURCES = ROOT / "csrc" / "cuda"
FORWARD, REVERSED, RANDOM = range(3)

pytestmark = pytest.mark.skipif(not SOURCES.exists(), reason="csrc/cuda is not beside the tests")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the kernels of emulation.cu, with a mistake planted or without."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulation")

    def compile(*flags: str) -> Path:
        output = folder / f"{'_'.join(flags) or 'right'}.so"
        if not output.exists():
            options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DFK_EMULATE=1", f"-I{SOURCES}", *flags]
            files = [
                "-x",
                "c++",
                Path(__file__).with_name("emulation.cu"),
                SOURCES / "host" / "emulation.cpp",
            ]
            subprocess.run([compiler, *options, *files, "-o", output], check=True)
        return output

    return compile


def load(path: Path, order: int = FORWARD) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("product", "shift", "unaligned", "crowded"):
        getattr(library, name).restype = ctypes.c_char_p
    library.flamingo_kernels_emulation_order(order)
    return library


def product(library: ctypes.CDLL) -> tuple[str, bool]:
    """What the launch says, and whether its results are right."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    c, total = torch.zeros(16, 8), torch.zeros(1)
    message = library.product(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c, total))).decode()
    exact = a.double() @ b.double().T
    right = torch.allclose(c.double(), exact, atol=1e-4)
    return message, right and torch.allclose(total.double(), 2 * exact.sum(), atol=1e-3)


def shift(library: ctypes.CDLL, count: int) -> bool:
    values = torch.randn(count)
    expected = values.roll(1)
    assert library.shift(ctypes.c_void_p(values.data_ptr()), count) == b""
    return torch.equal(values, expected)


@pytest.mark.parametrize("order", [FORWARD, REVERSED, RANDOM])
def test_right_kernels_are_right(build, order):
    library = load(build(), order)
    assert product(library) == ("", True)
    assert shift(library, 256)
    assert shift(library, 77)  # the other threads have returned


@pytest.mark.parametrize("mistake", ["WRONG_FRAGMENT", "LATE_WAIT", "NO_BARRIER"])
def test_a_mistake_shows_in_the_numbers(build, mistake):
    message, right = product(load(build(f"-DPLANT_{mistake}")))
    assert message == ""
    assert not right


def test_a_missing_barrier_shows_in_one_order_or_another(build):
    """Where the writers happen to come first nothing is wrong: that is what the orders are for."""
    library = build("-DPLANT_NO_SECOND_BARRIER")
    right = {order: product(load(library, order))[1] for order in (FORWARD, REVERSED)}
    assert right == {FORWARD: False, REVERSED: True}
    library = build("-DPLANT_NO_BARRIER")
    assert not all(shift(load(library, order), 77) for order in (FORWARD, REVERSED, RANDOM))


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("BEYOND", "ldmatrix reaches beyond the shared memory of its block"),
        ("DIVERGED", "the lanes of a warp do not meet in one instruction"),
        ("OVERRUN", "a thread has written beyond the shared memory of its block"),
        ("NO_WAIT", "a thread has returned before what it copies has been waited for"),
    ],
)
def test_a_mistake_fails_the_launch(build, mistake, expected):
    message, _ = product(load(build(f"-DPLANT_{mistake}")))
    assert message.startswith(f"emulation: {expected}")


def test_a_launch_of_the_wrong_shape_fails(build):
    values = torch.zeros(16)
    library = load(build())
    assert b"is not aligned" in library.unaligned(ctypes.c_void_p(values.data_ptr()))
    assert b"more than 99 KiB" in library.shift(ctypes.c_void_p(values.data_ptr()), 10**6)
    assert b"a grid of 4294967297 x 1 blocks is above" in library.crowded(ctypes.c_int64(2**32 + 1))


SANITIZED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
buffers = [(ctypes.c_uint16 * n)() for n in (256, 128, 256, 2)]
library.product(*buffers)
print("survived")
"""


@pytest.mark.parametrize("mistake", ["", "OVERRUN"])
def test_the_address_sanitizer_knows_the_fibers(build, mistake):
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], text=True, capture_output=True).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("no AddressSanitizer")
    library = build("-fsanitize=address", *([f"-DPLANT_{mistake}"] if mistake else []))
    environment = os.environ | {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(library)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert ("survived" in done.stdout) is (mistake == ""), done.stderr
    assert ("AddressSanitizer" in done.stderr) is (mistake != "")
