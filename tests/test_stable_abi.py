"""The bindings use what the oldest torch has, and find it in the libraries that are loaded with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flamingo_kernels
from tests.helpers import ROOT
from tests.test_setup import load_setup

BINDINGS = (
    "csrc/checks.h",
    "csrc/gated_block.h",
    "csrc/operators.h",
    "csrc/tensors.h",
    "csrc/cpu/bindings.cpp",
    "csrc/cuda/bindings.cpp",
)
EXTENSION = Path(flamingo_kernels.__file__).with_name("_C.abi3.so")
HEADERS = "FLAMINGO_KERNELS_TEST_HEADERS"  # names a folder torch/include of the oldest torch
OLDEST = "2.10.0"
USED = re.compile(r"\b(?:[A-Z]+_)?TORCH_[A-Z_]+\b|\btorch::[\w:]*\w|\b(?:aoti_)?torch_\w+(?=\()")
SYMBOL = re.compile(r"\b(?:aoti_)?torch_\w+$")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the sources are not beside the tests")


def oldest() -> dict[str, str]:
    """Where the oldest torch has each name that the bindings use: in a header or in a library."""
    lines = (ROOT / "tests" / "oldest_torch.txt").read_text().splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def used(source: str) -> set[str]:
    return set(USED.findall(re.sub(r"//.*", "", source)))


@pytest.mark.parametrize("source", BINDINGS)
def test_the_bindings_name_only_what_the_oldest_torch_has(source):
    """Before you use another, find it in the headers of the oldest; the slow tests compile with them."""
    names = used((ROOT / source).read_text())
    assert names or source in ("csrc/checks.h", "csrc/gated_block.h")  # which see torch by tensors.h
    assert sorted(names - oldest().keys()) == []


def test_a_name_that_is_too_new_is_found():
    line = "STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_later(torch::stable::from_blob(x)));  // TORCH_BOX"
    assert used(line) == {"STABLE_TORCH_ERROR_CODE_CHECK", "aoti_torch_get_later", "torch::stable::from_blob"}
    assert not used(line) & oldest().keys()


def undefined(library: Path) -> set[str]:
    """The symbols that a library expects of torch."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    said = subprocess.run(
        ["nm", "-D", "--undefined-only", library], text=True, capture_output=True, check=True
    )
    return {name for line in said.stdout.splitlines() if SYMBOL.search(name := line.split()[-1])}


def assert_found(library: Path, loaded: set[str]) -> None:
    """Every symbol of torch is in one of the libraries that are loaded before, as the oldest torch has it."""
    names = undefined(library)
    assert names
    assert sorted(name for name in names if oldest().get(name) not in loaded) == []


def test_the_extension_finds_its_symbols():
    if not EXTENSION.exists():
        pytest.skip("the C++ extension is not built")
    assert_found(EXTENSION, {"libtorch_cpu.so"})


@pytest.fixture(scope="module")
def headers() -> Path:
    """`torch/include` of the oldest torch: half a gigabyte to download, so it is kept under build/."""
    given = os.environ.get(HEADERS)
    kept = ROOT / "build" / f"torch-{OLDEST}"
    if not given and not kept.exists():
        download(kept)
    return Path(given) if given else kept / "torch" / "include"


def download(folder: Path) -> None:
    wheels = folder.with_suffix(".wheel")
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--dest", wheels]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"torch=={OLDEST}"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"no headers of torch {OLDEST} ({HEADERS} may name them): {reason}")
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            folder, [name for name in archive.namelist() if name.startswith("torch/include/torch/")]
        )
    shutil.rmtree(wheels)


@pytest.mark.slow
def test_the_list_is_of_the_oldest_headers(headers):
    folders = ("torch/csrc/stable", "torch/csrc/inductor/aoti_torch/c", "torch/headeronly")
    files = {path: path.read_text() for folder in folders for path in (headers / folder).rglob("*.h")}
    words = set(re.findall(r"\w+", " ".join(files.values())))
    for name, where in oldest().items():
        last = name.rpartition("::")[2]
        if where.endswith(".h"):
            assert re.search(rf"\b{last}\b", files[headers / where]), f"{where} has no {name}"
        elif "_dtype_" not in name and "_layout_" not in name:  # these the headers make by macros
            assert last in words, f"no header has {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ("csrc/cpu/bindings.cpp", []),
        ("csrc/cuda/bindings.cpp", ["-DUSE_CUDA", '-DFK_BUILD=""']),
        ("csrc/cuda/bindings.cpp", ["-DFK_EMULATE=1", '-DFK_BUILD=""']),
    ],
    ids=["cpu", "cuda", "emulated"],
)
def test_the_bindings_compile_with_the_oldest_headers(source, flags, headers):
    setup = load_setup()
    if not setup.COMPILER:
        pytest.skip("no C++ compiler")
    options = [*setup.FLAGS.split(), *setup.STABLE_ABI.split(), "-isystem", headers, *flags]
    command = [*setup.COMPILER, *options, "-fsyntax-only", ROOT / source]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
