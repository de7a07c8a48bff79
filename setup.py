"""Builds `flamingo_kernels/_C.abi3.so`, the CPU kernels, when a C++ compiler is there.

One binary serves every torch >= 2.10 and every Python >= 3.10: `bindings.cpp` sees PyTorch's stable ABI only.
`kernels.cpp` is compiled once for each instruction set in `VARIANTS`; the processor's is chosen at run time.

Environment:
    FLAMINGO_KERNELS_BUILD    cpu | cuda | none; without it cpu where a C++ compiler is found, else none
    FLAMINGO_KERNELS_EMULATE  1: compile every variant for this very processor, so that the tests run the
                              wide kernels on machines that lack their instructions
    CXX                       the C++ compiler
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILDS = ("cpu", "cuda", "none")
SOURCES = Path("csrc", "cpu")

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
VARIANTS = {  # from the least to the most capable: see `Build.objects`
    "portable": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi"
# What bindings.cpp is held to: the C ABI of torch 2.10 and of Python 3.10.
TORCH_OLDEST = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030A0000"


def say(line: str) -> None:
    print(f"flamingo_kernels: {line}", file=sys.stderr, flush=True)


def find_compiler() -> list[str]:
    """The command of a C++ compiler that knows g++'s options and compiles, or an empty list."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]) and accepts(command, "-std=c++20"):
            return command
    return []


def accepts(compiler: list[str], flags: str) -> bool:
    command = [*compiler, *flags.split(), "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def choose_build(compiler: list[str]) -> str:
    build = os.environ.get("FLAMINGO_KERNELS_BUILD") or ("cpu" if compiler else "none")
    if build not in BUILDS:
        sys.exit(f"FLAMINGO_KERNELS_BUILD={build!r} is not one of {', '.join(BUILDS)}.")
    if build == "cuda":
        sys.exit("FLAMINGO_KERNELS_BUILD=cuda: this version has no CUDA kernels; use cpu or none.")
    if build == "cpu" and not compiler:
        sys.exit("FLAMINGO_KERNELS_BUILD=cpu needs a C++20 compiler: install g++ or clang++, or set CXX.")
    if build == "none" and not compiler:
        say("no C++20 compiler (CXX, c++, g++, clang++): backend 'cpu' is not built, 'reference' still works")
    return build


def find_torch() -> Path:
    """Torch's folder, found without importing torch."""
    spec = util.find_spec("torch")
    found = metadata.version("torch") if spec else "none"
    if not spec or tuple(map(int, found.split(".")[:2])) < TORCH_OLDEST:
        oldest = ".".join(map(str, TORCH_OLDEST))
        sys.exit(
            f"flamingo_kernels: building the CPU kernels needs torch>={oldest} in this environment, "
            f"found {found}: pip install torch, then pip install --no-build-isolation .\n"
            "Or build without them: FLAMINGO_KERNELS_BUILD=none pip install ."
        )
    return Path(spec.submodule_search_locations[0])


class Object(NamedTuple):
    """One source compiled one way."""

    source: Path
    output: Path
    command: list[str]

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".command")

    def is_current(self) -> bool:
        """Whether this very command made the output from files that have not changed since."""
        depends = self.output.with_suffix(".d")
        if not (self.output.exists() and depends.exists() and self.record.exists()):
            return False
        if self.record.read_text() != shlex.join(self.command):
            return False
        names = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
        made = self.output.stat().st_mtime_ns
        return all(Path(name).exists() and Path(name).stat().st_mtime_ns <= made for name in names)

    def compile(self) -> None:
        say(f"compiling {self.output.stem}")
        self.record.unlink(missing_ok=True)
        began = time.time_ns()
        if subprocess.run(self.command).returncode:
            raise SystemExit(f"flamingo_kernels: {self.source} does not compile: {shlex.join(self.command)}")
        os.utime(self.output, ns=(began, began))  # a header edited meanwhile is newer than the object
        self.record.write_text(shlex.join(self.command))


class Build(build_ext):
    """build_ext that compiles one source under several instruction sets, each object only when it must."""

    def build_extension(self, extension: Extension) -> None:
        self.torch = find_torch()
        self.emulate = os.environ.get("FLAMINGO_KERNELS_EMULATE") == "1"
        objects = self.objects()
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            list(pool.map(Object.compile, [one for one in objects if not one.is_current()]))
        finally:
            pool.shutdown(cancel_futures=True)  # after one failure the others would only repeat it
        self.link(objects, Path(self.get_ext_fullpath(extension.name)))

    def objects(self) -> list[Object]:
        """All objects in link order. Where several share an inline function of the C++ library the linker
        keeps the first body, so the least capable come first: their code is legal on every processor.
        """
        variants = self.variants()
        have = [f"-DFK_HAVE_{name.upper()}=1" for name in variants]
        stable_abi = [*STABLE_ABI.split(), "-isystem", str(self.torch / "include")]
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name != "kernels.cpp":
                extra = stable_abi if source.name == "bindings.cpp" else []
                objects.append(self.object(source, source.stem, *have, *extra))
        for name, flags in variants.items():
            kernels = SOURCES / "kernels.cpp"
            objects.append(self.object(kernels, f"kernels.{name}", f"-DFK_ISA={name}", *flags.split()))
        return objects

    def variants(self) -> dict[str, str]:
        """The variants this compiler can make for this processor family, with their flags."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        variants = {}
        for name, flags in VARIANTS.items() if x86 else [("portable", "")]:
            if accepts(COMPILER, flags):
                variants[name] = "-march=native" if self.emulate else flags
            else:
                say(f"{COMPILER[0]} does not know {flags!r}: no {name} kernels")
        return variants

    def object(self, source: Path, name: str, *flags: str) -> Object:
        # Not in build_temp, which an editable install throws away.
        folder = Path("build", "objects-emulated" if self.emulate else "objects")
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{name}.o"
        emulate = ["-DFK_EMULATE=1"] if self.emulate else []
        command = [*COMPILER, *FLAGS.split(), *emulate, *flags, "-MD", "-c", str(source), "-o", str(output)]
        return Object(source, output, command)

    def link(self, objects: list[Object], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [str(one.output) for one in objects]
        # Python loads libtorch privately: only a library that names it finds its symbols.
        libraries = ["-L", str(self.torch / "lib"), "-ltorch_cpu"]
        if subprocess.run([*COMPILER, "-shared", *inputs, *libraries, "-o", str(output)]).returncode:
            raise SystemExit(f"flamingo_kernels: {output.name} does not link.")


class Wheel(bdist_wheel):
    """A wheel that any Python from 3.10 on takes, when it holds the extension."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310" if self.distribution.ext_modules else None
        super().finalize_options()


COMPILER = find_compiler()
EXTENSION = Extension(
    "flamingo_kernels._C",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    py_limited_api=True,
)

if __name__ == "__main__":
    setup(
        ext_modules=[EXTENSION] if choose_build(COMPILER) == "cpu" else [],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
