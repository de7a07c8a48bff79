"""What setup.py decides: which build, which compiler, which instruction sets, what to compile again."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

from flamingo_kernels._backends import missing
from tests.helpers import ROOT

SETUP = ROOT / "setup.py"

pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="setup.py is not beside the tests")


def load_setup():
    spec = util.spec_from_file_location("flamingo_setup", SETUP)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
NO_TORCH = """
import subprocess, sys
run, sys.modules["torch"] = subprocess.run, None
def ask_nobody(command, **options):
    return run(["false"] if command[1] == "-c" else command, **options)
subprocess.run = ask_nobody
"""


def run_without_torch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in a process where `import torch` fails, and no other Python has it."""
    return run_setup(NO_TORCH, *arguments, **environment)


def run_setup(before: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLAMINGO_KERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", before + RUN, *arguments],
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


def test_a_build_without_torch_names_the_remedy(compiler, tmp_path):
    done = run_without_torch("build_ext", "--build-lib", str(tmp_path), FLAMINGO_KERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert "need headers of torch>=2.10, found none: install torch, then this once more." in done.stderr


def test_without_torch_nothing_is_built_and_a_line_says_so(compiler, tmp_path):
    done = run_without_torch("build_ext", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("need headers of torch>=2.10, found none: install torch") == 1
    assert not list(tmp_path.iterdir())


def fake_torch(folder: Path, version: str, cuda: str = "None") -> Path:
    folder.mkdir()
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = '6.0'\n"
    (folder / "version.py").write_text(text)
    return folder


def fake_python(folder: Path, torch: Path) -> str:
    """A Python that finds this torch."""
    folder.mkdir()
    (folder / "python3").write_text(f"#!/bin/sh\necho {torch}\n")
    (folder / "python3").chmod(0o755)
    return str(folder)


def test_torch_is_found_where_pip_hides_it(tmp_path, monkeypatch):
    setup = load_setup()
    expected = Path(util.find_spec("torch").submodule_search_locations[0])
    (tmp_path / "torch.py").write_text("")  # what isolation puts before everything
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(setup.util, "find_spec", lambda name: None)
    assert next(setup.torch_folders()) == expected


def test_torch_is_found_in_an_active_environment(tmp_path, monkeypatch):
    setup = load_setup()
    old, new = fake_torch(tmp_path / "old", "2.9.1+cpu"), fake_torch(tmp_path / "new", "2.10.0")
    folders = [fake_python(tmp_path / f"bin-{torch.name}", torch) for torch in (old, new)]
    monkeypatch.setattr(setup.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup, "parent_python", list)
    monkeypatch.setattr(setup.sys, "executable", "")
    monkeypatch.setenv("PATH", os.pathsep.join(["/bin/none", *folders]))
    assert setup.find_torch() == (new, "2.10.0")
    setup.find_torch.cache_clear()
    monkeypatch.setenv("PATH", folders[0])
    assert setup.find_torch() == (None, "2.9.1+cpu")


def test_the_parents_python_is_known_by_its_relative_name(tmp_path):
    """As `venv/bin/python -m build`, whose hooks run elsewhere in another environment."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no Linux")
    child = f"import runpy; print(*runpy.run_path({str(SETUP)!r})['parent_python']())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], cwd={str(ROOT)!r})"
    python = Path(sys.executable)
    said = subprocess.run(
        [f"{python.parent.name}/{python.name}", "-c", parent],
        cwd=python.parents[1],
        text=True,
        capture_output=True,
    )
    assert said.stdout.strip() == sys.executable, said.stderr


def test_setuptools_that_cannot_read_the_project_says_so():
    done = run_setup("import setuptools; setuptools.__version__ = '76.1.0'\n", "--version")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "needs setuptools>=77, found 76.1.0: pip install --upgrade setuptools" in line


@pytest.mark.parametrize(("free_threaded", "tag"), [(0, "cp310-abi3"), (1, "cp3")])
def test_free_threaded_python_gets_a_wheel_of_its_own(free_threaded, tag, monkeypatch):
    setup = load_setup()
    read = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: free_threaded if name == "Py_GIL_DISABLED" else read(name)
    )
    wheel = setup.Wheel(Distribution({"name": "k", "ext_modules": [setup.EXTENSION]}))
    wheel.finalize_options()
    python, abi, _ = wheel.get_tag()
    assert f"{python}-{abi}".startswith(tag)
    assert (abi == "abi3") is not bool(free_threaded)


def test_the_library_has_one_name_for_every_python(monkeypatch):
    setup = load_setup()
    monkeypatch.setattr(
        "setuptools.command.build_ext.get_abi3_suffix", lambda: None
    )  # as in free-threaded ones
    built = setup.Build(Distribution({"ext_modules": [setup.EXTENSION]}))
    built.finalize_options()
    assert built.get_ext_filename("flamingo_kernels._C") == str(Path("flamingo_kernels", "_C.abi3.so"))


def test_a_wheel_leaves_its_kernels_in_the_checkout(tmp_path, monkeypatch):
    setup = load_setup()
    monkeypatch.chdir(tmp_path)
    for path in ("lib/flamingo_kernels/_C.abi3.so", "flamingo_kernels/_C.abi3.so.failed"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text("new")
    loaded = Path("flamingo_kernels", "_C.abi3.so")
    loaded.write_text("old")
    with loaded.open() as before:
        monkeypatch.setattr(setup.bdist_wheel, "run", lambda self: None)
        distribution = Distribution({"name": "k", "ext_modules": [setup.EXTENSION]})
        distribution.cmdclass["build_ext"] = setup.Build
        distribution.get_command_obj("build_ext").build_lib = "lib"
        setup.Wheel(distribution).run()
        assert (before.read(), loaded.read_text()) == ("old", "new"), "a process that has it keeps it"
    assert missing.failed_build(loaded) == ""


def test_an_unknown_build_lists_the_legal_ones():
    done = run_without_torch("--version", FLAMINGO_KERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "FLAMINGO_KERNELS_BUILD='gpu' is not one of cpu, cuda, cuda-alone, none." in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("FLAMINGO_KERNELS_EMULATE", "yes", "FLAMINGO_KERNELS_EMULATE='yes' is not one of 1, cuda."),
        ("CXXFLAGS", '-DNAME="a', "CXXFLAGS='-DNAME=\"a': No closing quotation."),
    ],
)
def test_a_variable_without_a_meaning_is_a_line(name, value, line):
    done = run_without_torch("--version", **{name: value})
    assert (done.returncode, done.stderr) == (1, f"{line}\n")


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
    monkeypatch.setattr(setup, "NVCC", nvcc(tmp_path))
    found = SimpleNamespace(submodule_search_locations=[str(fake_torch(tmp_path / "torch", "2.13.0", cuda))])
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
