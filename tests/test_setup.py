"""What setup.py decides: which build, which compiler, which instruction sets, what to compile again."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Command, Distribution

from flamingo_kernels._backends import missing
from tests.helpers import ROOT

SETUP = ROOT / "setup.py"

pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="setup.py is not beside the tests")


def load_setup():
    spec = importlib.util.spec_from_file_location("flamingo_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_without_torch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in a process where `import torch` fails."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLAMINGO_KERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=clean | environment,
        text=True,
        capture_output=True,
    )


@pytest.fixture
def compiler() -> list[str]:
    found = load_setup().COMPILER
    if not found:
        pytest.skip("no C++ compiler")
    return found


def test_setup_imports_no_torch():
    done = run_without_torch("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].count(".") == 2


def test_older_setuptools_take_wheels_from_their_own_package(monkeypatch):
    theirs = type("bdist_wheel", (), {})
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    monkeypatch.setitem(sys.modules, "wheel.bdist_wheel", SimpleNamespace(bdist_wheel=theirs))
    assert issubclass(load_setup().Wheel, theirs)
    monkeypatch.setitem(sys.modules, "wheel.bdist_wheel", None)
    assert load_setup().bdist_wheel is Command, "libraries are built without either"


def test_a_build_without_torch_names_the_remedy(compiler, tmp_path):
    done = run_without_torch("build_ext", "--build-lib", str(tmp_path), FLAMINGO_KERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert "torch>=2.10" in done.stderr
    assert "pip install torch, then pip install --no-build-isolation ." in done.stderr


def test_an_unknown_build_lists_the_legal_ones():
    done = run_without_torch("--version", FLAMINGO_KERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "FLAMINGO_KERNELS_BUILD='gpu' is not one of cpu, cuda, cuda-alone, none." in done.stderr


def test_cuda_without_its_compiler_is_an_error():
    done = run_without_torch("--version", FLAMINGO_KERNELS_BUILD="cuda", NVCC="no-such-nvcc")
    assert done.returncode != 0
    assert "found no no-such-nvcc" in done.stderr
    assert "set NVCC" in done.stderr


def nvcc(folder: Path) -> str:
    """A compiler that knows sm_80 and sm_90 and compiles nothing."""
    path = folder / "nvcc"
    known = (
        "case $1 in --version) echo release 12.4,;; --list-gpu-arch) echo compute_80; echo compute_90;; esac"
    )
    path.write_text(f"#!/bin/sh\n{known}\n")
    path.chmod(0o755)
    return str(path)


def test_architectures_that_nvcc_does_not_know_are_left_out(tmp_path, monkeypatch, capsys):
    setup = load_setup()
    monkeypatch.setattr(setup, "NVCC", nvcc(tmp_path))
    monkeypatch.delenv("FLAMINGO_KERNELS_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs() == ["80", "90"]
    assert (
        "nvcc 12.4 does not know sm_100, sm_120, sm_86, sm_89: no kernels for them" in capsys.readouterr().err
    )
    monkeypatch.setenv("FLAMINGO_KERNELS_CUDA_ARCHS", "120")
    with pytest.raises(SystemExit, match=r"nvcc 12\.4 knows compute_80, compute_90"):
        setup.cuda_archs()


@pytest.mark.parametrize(("cuda", "expected"), [("'13.0'", "cuda"), ("None", "cpu")])
def test_cuda_is_built_unasked_only_for_a_torch_of_cuda(cuda, expected, compiler, tmp_path, monkeypatch):
    setup = load_setup()
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {cuda}\nhip: Optional[str] = '6.0'\n")
    monkeypatch.setattr(setup, "NVCC", nvcc(tmp_path))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(setup.util, "find_spec", lambda _: found)
    assert setup.best_build(compiler) == expected
    assert setup.best_build([]) == "none"


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "false"}, {"CXX": "no-such-compiler"}, {"CXX": "", "PATH": ""}],
    ids=["broken", "absent", "empty-path"],
)
def test_without_a_compiler_nothing_is_built_and_a_line_says_so(environment, tmp_path):
    done = run_without_torch("build_ext", "--build-lib", str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("backend 'cpu' is not built") == 1
    assert not list(tmp_path.iterdir())


def test_cpu_without_a_compiler_is_an_error():
    done = run_without_torch("--version", CXX="false", FLAMINGO_KERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert "needs a C++20 compiler" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the portable variant only")
@pytest.mark.parametrize(
    ("flag", "lost"), [("amx-bf16", ["avx512_amx"]), ("avx512bf16", ["avx512_bf16", "avx512_amx"])]
)
def test_a_flag_the_compiler_does_not_know_costs_its_variants(
    flag, lost, compiler, tmp_path, monkeypatch, capsys
):
    old = tmp_path / "old-c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *{flag}*) exit 1;; esac\nexec {" ".join(compiler)} "$@"\n')
    old.chmod(0o755)
    setup = load_setup()
    monkeypatch.setattr(setup, "COMPILER", [str(old)])
    build = setup.Build(Distribution())
    build.emulate = False
    assert list(build.variants()) == [name for name in setup.VARIANTS if name not in lost]
    said = capsys.readouterr().err
    assert all(f"no {name} kernels" in said for name in lost)


def test_an_object_is_made_again_only_when_source_header_or_flags_changed(compiler, tmp_path):
    setup = load_setup()
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    header.write_text("inline int one() { return 1; }\n")
    source.write_text('#include "a.h"\nint two() { return 2 * one(); }\n')

    def unit(*flags: str):
        output = tmp_path / "a.o"
        command = [*compiler, *flags, "-MD", "-c", str(source), "-o", str(output)]
        return setup.Object(source, output, command)

    assert not unit().is_current()
    unit().compile()
    assert unit().is_current()
    assert not unit("-DNEW").is_current()
    for changed in (source, header):
        changed.touch()
        assert not unit().is_current()
        unit().compile()
        assert unit().is_current()
    late = unit()._replace(
        command=["sh", "-c", f'sleep 0.1; touch {header}; exec "$@"', "sh", *unit().command]
    )
    late.compile()
    assert not late.is_current()  # the header may have been read before it was edited
    header.write_text("inline int one() { return 1 }\n")
    with pytest.raises(SystemExit, match=r"a\.cpp does not compile: .*a\.h:1:.* error: "):
        unit().compile()
    assert not unit().is_current()


def test_a_failed_build_leaves_its_reason_until_one_succeeds(tmp_path, monkeypatch):
    setup = load_setup()
    library = tmp_path / "lib" / "_C.abi3.so"
    outcome = ["a.cpp does not compile: a.cpp:1: error: no such type"]
    build = setup.Build(Distribution())
    monkeypatch.setattr(build, "get_ext_fullpath", lambda name: str(library))
    monkeypatch.setattr(build, "build_library", lambda *_: outcome and sys.exit(outcome[0]))
    with pytest.raises(SystemExit, match="no such type"):
        build.build_extension(setup.EXTENSION)
    assert missing.failed_build(library) == outcome[0]
    outcome.clear()
    build.build_extension(setup.EXTENSION)
    assert missing.failed_build(library) == ""


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            "echo In file >&2; echo 'a.cu(3): error: no type' >&2; echo 1 error detected >&2",
            "a.cu(3): error: no type",
        ),
        ("echo 'ptxas fatal   : Unresolved' >&2; echo bye >&2", "ptxas fatal   : Unresolved"),
        ("echo first >&2; echo last >&2", "last"),
        (":", "sh ended with status 3"),
    ],
)
def test_the_first_error_of_a_compiler(said, first):
    setup = load_setup()
    assert setup.run(["sh", "-c", f"{said}; exit 3"]) == first
    assert setup.run(["sh", "-c", said]) == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lists_its_targets():
    listed = subprocess.run(["make", "help"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    targets = [line.split()[0] for line in listed.splitlines()]
    assert {"help", "demo", "test", "test-slow", "lint", "format", "bench", "info", "clean"} <= set(targets)


def test_one_ptx_serves_the_gpus_of_a_family():
    setup = load_setup()
    assert setup.cuda_targets(["80", "90"]) == (
        ["-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]"],
        "80",
    )
    assert setup.cuda_targets(["90", "120", "86", "100"]) == (
        [
            "-gencode=arch=compute_86,code=[sm_90,sm_86]",
            "-gencode=arch=compute_100,code=[sm_120,sm_100,compute_100]",
        ],
        "100",
    )


def test_no_library_takes_the_place_of_a_module():
    """Python looks for `name.abi3.so` before `name.py`."""
    setup = load_setup()
    for extension in (setup.EXTENSION, setup.CUDA_EXTENSION):
        assert not Path(ROOT, *extension.name.split(".")).with_suffix(".py").exists(), extension.name
