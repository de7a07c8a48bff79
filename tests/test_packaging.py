"""What the built extension needs and holds, and what the wheels are called and carry."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flamingo_kernels
from tests.helpers import ROOT

EXTENSION = Path(flamingo_kernels.__file__).with_name("_C.abi3.so")
WIDE = re.compile(r"flamingo_kernels::(avx512_amx|avx512_bf16|avx512|avx2_vnni|avx2)::")
ALLOWED = {
    "": set(),
    "avx2": {"ymm"},
    "avx2_vnni": {"ymm"},
    "avx512": {"ymm", "zmm"},
    "avx512_bf16": {"ymm", "zmm"},
    "avx512_amx": {"ymm", "zmm", "tmm"},
}


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(tool: str) -> None:
    if not EXTENSION.exists():
        pytest.skip("the C++ extension is not built")
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}")


def test_the_extension_needs_only_the_stable_abi():
    needs("nm")
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", EXTENSION).splitlines()]
    names = [line.split(None, 1)[1] for line in run("nm", "-DuC", EXTENSION).splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [name for name in names if re.search(r"\b(c10|at|torch)::", name)] == []
    assert [name for name in symbols if re.match(r"_?Py", name)] == []


def test_the_extension_exports_no_kernel():
    needs("nm")
    names = [line.split(None, 2)[-1] for line in run("nm", "-DC", "--defined-only", EXTENSION).splitlines()]
    assert names
    assert [name for name in names if name.startswith("flamingo_kernels::")] == []


@pytest.mark.skipif(os.environ.get("FLAMINGO_KERNELS_EMULATE") == "1", reason="every variant is native here")
def test_wide_registers_stay_in_the_variants_that_may_use_them():
    needs("objdump")
    used: dict[str, set[str]] = {variant: set() for variant in ALLOWED}
    for line in run("objdump", "-dC", "--no-show-raw-insn", EXTENSION).splitlines():
        if line.endswith(">:"):
            function = line
            found = WIDE.search(function)
            variant = found[1] if found else ""
        tiles = ["tmm"] * bool(re.search(r"\b((ld|st)tilecfg|tilerelease)\b", line))
        for register in re.findall(r"%([tyz]mm)\d", line) + tiles:
            used[variant].add(register)
            assert register in ALLOWED[variant], f"{register} in {function}"
    if WIDE.search(run("nm", "-C", EXTENSION)):
        assert "ymm" in used["avx2"]
    if "::avx512_amx::" in run("nm", "-C", EXTENSION):
        assert "tmm" in used["avx512_amx"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project, with its compiled objects, so that a wheel takes seconds."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources are not beside the tests")
    copy = tmp_path_factory.mktemp("source")
    for name in ("flamingo", "flamingo_kernels", "csrc", "build/objects", "build/objects-cuda-90"):
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy)
    return copy


def wheel(source: Path, folder: Path, build: str, **settings: str) -> tuple[str, set[str]]:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    environment = os.environ | {"FLAMINGO_KERNELS_BUILD": build} | settings
    run(sys.executable, "-m", "pip", "wheel", *options, source, env=environment)
    (made,) = folder.iterdir()
    with zipfile.ZipFile(made) as archive:
        return made.name, set(archive.namelist())


@pytest.mark.slow
def test_the_wheel_with_kernels_fits_every_python_from_3_10(source, tmp_path):
    if not EXTENSION.exists():
        pytest.skip("the C++ extension is not built")
    name, files = wheel(source, tmp_path, "cpu")
    assert re.fullmatch(r"flamingo_kernels-[\d.]+-cp310-abi3-\w+\.whl", name)
    assert "flamingo_kernels/_C.abi3.so" in files
    assert {"flamingo/__init__.py", "flamingo_kernels/py.typed"} <= files


@pytest.fixture(scope="module")
def cuda_wheel(source, tmp_path_factory) -> Path:
    """A wheel with the kernels for the CPU and for one GPU."""
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("wheel")
    name, _ = wheel(source, folder, "cuda", FLAMINGO_KERNELS_CUDA_ARCHS="90", FLAMINGO_KERNELS_EMULATE="")
    return folder / name


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs Python in a new environment that has this one's packages but not this project, with a wheel."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def install(file: Path) -> Callable[..., str]:
        place = folder / file.stem
        run(sys.executable, "-m", "venv", "--without-pip", place)
        python = place / "bin" / "python"
        (packages,) = place.glob("lib/python*/site-packages")
        # Behind what is installed there; an editable install, which is a .pth itself, stays out.
        (packages / "torch.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
        options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, file)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLAMINGO_KERNELS_")}

        def call(*arguments: str) -> str:
            return run(python, *arguments, cwd=folder, env=kept | {"PYTHONPATH": ""})

        where = call("-c", "import flamingo_kernels; print(flamingo_kernels.__file__)").strip()
        assert Path(where).is_relative_to(packages)
        return call

    return install


@pytest.mark.slow
def test_one_wheel_holds_the_kernels_for_cpu_and_gpu(cuda_wheel):
    assert re.fullmatch(r"flamingo_kernels-[\d.]+-cp310-abi3-\w+\.whl", cuda_wheel.name)
    with zipfile.ZipFile(cuda_wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    assert libraries == {"flamingo_kernels/_C.abi3.so", "flamingo_kernels/_C_cuda.abi3.so"}


@pytest.mark.slow
def test_the_wheel_with_cuda_says_what_it_holds_and_why_it_does_not_run(cuda_wheel, elsewhere):
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    found = json.loads(elsewhere(cuda_wheel)("-m", "flamingo_kernels", "info", "--json"))
    assert found["extension"]["loaded"]
    cuda = found["cuda_extension"]
    assert re.fullmatch(r"nvcc [\d.]+; -std=c\+\+20 -O3 .*; sm_90 and PTX of 90", cuda["build"])
    assert (cuda["loaded"], cuda["why_not"]) == (False, "there is no GPU that torch can use")
    assert {backends["cuda"] for backends in found["backends"].values()} == {cuda["why_not"]}


@pytest.mark.slow
@pytest.mark.parametrize("build", ["none", "cuda"])
def test_a_wheel_computes_in_a_clean_environment(build, source, cuda_wheel, elsewhere, tmp_path):
    file = cuda_wheel if build == "cuda" else tmp_path / wheel(source, tmp_path, build)[0]
    code = (
        "import torch, flamingo_kernels as fk\n"
        "x, gate = torch.ones(2, 4), torch.full((1,), 0.5)\n"
        "assert torch.allclose(fk.gated_residual(x, x, gate), x + gate.tanh())\n"
        "print([name for name, able in fk.available_backends('gated_residual').items() if able is True])"
    )
    expected = ["reference"] if build == "none" else ["cpu", "reference"]
    assert str(expected)[1:-1] in elsewhere(file)("-c", code)


@pytest.mark.slow
def test_a_plain_install_builds_with_the_torch_that_is_there(source, tmp_path):
    """In an isolated environment, with every dependency: no second torch is collected."""
    if not EXTENSION.exists():
        pytest.skip("the C++ extension is not built")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    seen = [path for path in site.getsitepackages() if Path(path, "torch").exists()]
    (packages / "torch.pth").write_text("\n".join(seen))
    (source / "flamingo_kernels" / EXTENSION.name).unlink(missing_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLAMINGO_KERNELS_")}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--verbose", "--ignore-installed"]
    said = run(*pip, "--no-deps", source, env=clean | {"PYTHONPATH": ""})
    assert "Installing build dependencies" in said
    assert not re.search(r"(Collecting|Downloading|Processing) \S*\btorch\b", said)
    for library in (
        packages / "flamingo_kernels" / EXTENSION.name,
        source / "flamingo_kernels" / EXTENSION.name,
    ):
        assert library.exists(), "installed, and in the checkout"
    loaded = "import flamingo_kernels as fk; print(fk.available_backends('linear')['cpu'])"
    for folder in (tmp_path, source):
        assert run(python, "-c", loaded, cwd=folder, env=clean | {"PYTHONPATH": ""}) == "True\n"


@pytest.mark.slow
def test_the_wheel_without_kernels_is_pure(source, tmp_path):
    name, files = wheel(source, tmp_path, "none")
    assert re.fullmatch(r"flamingo_kernels-[\d.]+-py3-none-any\.whl", name)
    assert not [file for file in files if file.endswith(".so")]
    folders = {file.split("/")[0] for file in files if ".dist-info/" not in file}
    assert folders == {"flamingo", "flamingo_kernels"}


@pytest.mark.slow
def test_the_source_archive_holds_everything_the_build_reads(source, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=source, env=os.environ | {"FLAMINGO_KERNELS_BUILD": "cpu"})
    (made,) = tmp_path.iterdir()
    with tarfile.open(made) as archive:
        files = {member.name.split("/", 1)[-1] for member in archive.getmembers()}
    wanted = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*") if path.is_file()}
    wanted.remove("csrc/README.md")
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE"} <= files
