"""Builds the kernels: `flamingo_kernels/_C.abi3.so` for the CPU, `_C_cuda.abi3.so` for NVIDIA GPUs.

One binary serves every torch >= 2.10 and every Python >= 3.10: `bindings.cpp` sees PyTorch's stable ABI only.
`kernels.cpp` is compiled once for each instruction set in `VARIANTS`; the processor's is chosen at run time.
The CUDA kernels need nvcc but no GPU, and compile with a torch for the CPU too.

Only headers and libraries of torch are read, so any torch will do. An isolated build does not see the one
that is installed: `find_torch` looks where pip and build hide it, so that no second one is downloaded.

Environment:
    FLAMINGO_KERNELS_BUILD       cpu | cuda (both) | cuda-alone | none; without it cpu where a C++ compiler
                                 and torch are found, cuda where nvcc and a torch for CUDA are, else none
    FLAMINGO_KERNELS_CUDA_ARCHS  what GPUs to compile for, as in "80;90"; PTX for later ones comes along
    FLAMINGO_KERNELS_EMULATE     1: compile every CPU variant for this very processor, so that the tests run
                                 the wide kernels on machines that lack their instructions
                                 cuda: compile the CUDA kernels for this processor, and nothing else
    CXX, NVCC                    the compilers
    CXXFLAGS                     more flags for CXX, after ours
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import util
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SETUPTOOLS_OLDEST = 77  # the first that reads pyproject.toml's license
if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_OLDEST:
    sys.exit(
        f"flamingo_kernels: a build needs setuptools>={SETUPTOOLS_OLDEST}, found {setuptools.__version__}: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation."
    )
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (not in older ones)

BUILDS = ("cpu", "cuda", "cuda-alone", "none")
EMULATE = os.environ.get("FLAMINGO_KERNELS_EMULATE", "")
if EMULATE not in ("", "1", "cuda"):
    sys.exit(f"FLAMINGO_KERNELS_EMULATE={EMULATE!r} is not one of 1, cuda.")
SHARED = Path("csrc")
SOURCES = Path("csrc", "cpu")
CUDA_SOURCES = Path("csrc", "cuda")

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
VARIANTS = {  # from the least to the most capable: see `Build.objects`
    "portable": "",
    "avx2": AVX2,
    "avx2_vnni": f"{AVX2} -mavxvnni",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    "avx512_amx": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8",
}
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi"
try:
    USERS_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
except ValueError as error:  # a quotation mark without its other
    sys.exit(f"CXXFLAGS={os.environ['CXXFLAGS']!r}: {error}.")
# What bindings.cpp is held to: the C ABI of torch 2.10 and of Python 3.10.
TORCH_OLDEST = (2, 10)
TORCH_LIBRARIES = ("torch_cpu", "torch_cuda")
# By which pip hides an environment from the Python that is in it.
ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030A0000"

CUDA_ARCHS = "80;86;89;90;100;120"
BLACKWELL = 100
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden"


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
    build = os.environ.get("FLAMINGO_KERNELS_BUILD") or best_build(compiler)
    if build not in BUILDS:
        sys.exit(f"FLAMINGO_KERNELS_BUILD={build!r} is not one of {', '.join(BUILDS)}.")
    if "cuda" in build and not shutil.which(NVCC):
        sys.exit(
            f"FLAMINGO_KERNELS_BUILD={build} needs CUDA's compiler, found no {NVCC}: install it, or set NVCC."
        )
    if build != "none" and not compiler:
        sys.exit(
            f"FLAMINGO_KERNELS_BUILD={build} needs a C++20 compiler: install g++ or clang++, or set CXX."
        )
    if build == "none" and not compiler:
        say("no C++20 compiler (CXX, c++, g++, clang++): backend 'cpu' is not built, 'reference' still works")
    return build


def best_build(compiler: list[str]) -> str:
    """What is worth building here, where nobody has said."""
    if not compiler:
        return "none"
    torch, found = find_torch()
    if not torch:
        say(f"{no_torch(found)}; nothing is compiled, backend 'reference' still works")
        return "none"
    return "cuda" if shutil.which(NVCC) and is_for_cuda(torch) else "cpu"


def is_for_cuda(torch: Path) -> bool:
    return re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE) is not None


@cache
def find_torch() -> tuple[Path | None, str]:
    """The folder of a torch that is new enough, or none; and which versions were found. None is imported."""
    versions = []
    for folder in torch_folders():
        text = (folder / "version.py").read_text() if (folder / "version.py").exists() else ""
        if found := re.search(r"^__version__ = '((\d+)\.(\d+).*)'", text, re.MULTILINE):
            if (int(found[2]), int(found[3])) >= TORCH_OLDEST:
                return folder, found[1]
            versions.append(found[1])
    return None, ", ".join(dict.fromkeys(versions)) or "none"


def torch_folders() -> Iterator[Path]:
    """Torch in this environment, then in those that an isolated build hides from it."""
    spec = util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        yield Path(spec.submodule_search_locations[0])
    code = "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations)"
    seen = {key: value for key, value in os.environ.items() if key not in ISOLATION}
    for python in pythons():
        asked = subprocess.run([python, "-c", code], env=seen, text=True, capture_output=True)
        if asked.returncode == 0:
            yield Path(asked.stdout.strip())


def pythons() -> Iterator[str]:
    """Those that may have torch: this one, which pip's isolation runs too; that of the process which started
    this one, as `python -m build` makes an environment of its own; and those of active environments."""
    active = [str(Path(folder, "python3")) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    yield from filter(None, map(shutil.which, (sys.executable, *parent_python(), *active)))


def parent_python() -> list[str]:
    """The Python that the parent process was started as, where Linux tells."""
    process = Path("/proc", str(os.getppid()))
    try:
        name = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
        path = (process / "cwd").readlink() / name
    except OSError:
        return []
    return [str(path)] if path.name.startswith("python") else []


def no_torch(found: str) -> str:
    oldest = ".".join(map(str, TORCH_OLDEST))
    return f"the kernels need headers of torch>={oldest}, found {found}: install torch, then this once more"


def cuda_archs() -> list[str]:
    """What GPUs to compile for, less those that this nvcc does not know."""
    wanted = (os.environ.get("FLAMINGO_KERNELS_CUDA_ARCHS") or CUDA_ARCHS).split(";")
    known = subprocess.run(
        [NVCC, "--list-gpu-arch"], text=True, capture_output=True, check=True
    ).stdout.split()
    archs = [arch for arch in wanted if f"compute_{arch}" in known]
    if lost := sorted(set(wanted) - set(archs)):
        say(f"{nvcc_version()} does not know sm_{', sm_'.join(lost)}: no kernels for them")
    if not archs:
        sys.exit(
            f"FLAMINGO_KERNELS_CUDA_ARCHS={';'.join(wanted)}: {nvcc_version()} knows {', '.join(known)}."
        )
    return archs


def cuda_targets(archs: list[str]) -> tuple[list[str], str]:
    """nvcc's options for these GPUs, and whose PTX is kept for later ones.

    Making PTX is half of the work, so one serves many: no kernel asks for more than the oldest has. But from
    older PTX than its own sm_120 spills registers.
    """
    families = [[arch for arch in archs if (int(arch) < BLACKWELL) is before] for before in (True, False)]
    oldest = [min(family, key=int) for family in families if family]
    targets = []
    for family, base in zip(filter(None, families), oldest, strict=True):
        codes = [f"sm_{arch}" for arch in family] + [f"compute_{base}"] * (base == oldest[-1])
        targets.append(f"-gencode=arch=compute_{base},code=[{','.join(codes)}]")
    return targets, oldest[-1]


def nvcc_version() -> str:
    said = subprocess.run([NVCC, "--version"], text=True, capture_output=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def run(command: list[str]) -> str:
    """The first error of a compiler or linker, whose output is shown as it is, or an empty string."""
    done = subprocess.run(command, text=True, errors="replace", stderr=subprocess.PIPE)
    sys.stderr.write(done.stderr)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    say(shlex.join(command))
    last = lines[-1] if lines else f"{command[0]} ended with status {done.returncode}"
    return next(filter(re.compile(r"\b(error|fatal|undefined reference|cannot find)\b").search, lines), last)


def made_folder(name: str) -> Path:
    """Where objects go; not in build_temp, which an editable install throws away."""
    folder = Path("build", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        if error := run(self.command):
            raise SystemExit(f"flamingo_kernels: {self.source} does not compile: {error}")
        os.utime(self.output, ns=(began, began))  # a header edited meanwhile is newer than the object
        self.record.write_text(shlex.join(self.command))


class Build(build_ext):
    """build_ext that compiles one source in several ways, each object only when it must."""

    emulate = EMULATE == "1"

    def get_ext_filename(self, fullname: str) -> str:
        """The same for every Python: none imports it, and it names none of its symbols."""
        return f"{Path(*fullname.split('.'))}.abi3.so"

    def build_extension(self, extension: Extension) -> None:
        """Build it, or leave the reason beside where it would be, for `python -m flamingo_kernels info`."""
        output = Path(self.get_ext_fullpath(extension.name))
        failed = output.with_name(f"{output.name}.failed")
        failed.unlink(missing_ok=True)
        try:
            self.build_library(extension, output)
        except SystemExit as failure:
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(failure))
            raise

    def build_library(self, extension: Extension, output: Path) -> None:
        torch, found = find_torch()
        if not torch:
            raise SystemExit(
                f"flamingo_kernels: {no_torch(found)}. Or without them: FLAMINGO_KERNELS_BUILD=none"
            )
        self.torch = torch
        self.stable_abi = [*STABLE_ABI.split(), "-isystem", str(self.torch / "include")]
        cuda = extension.name == CUDA_EXTENSION.name
        objects = self.objects() if not cuda else self.emulated_objects() if EMULATE else self.cuda_objects()
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            list(pool.map(Object.compile, [one for one in objects if not one.is_current()]))
        finally:
            pool.shutdown(cancel_futures=True)  # after one failure the others would only repeat it
        if cuda and not EMULATE:
            # the stream is in libtorch_cuda; a torch for the CPU lacks it, and `_backends/cuda.py` opens it
            libraries = [name for name in TORCH_LIBRARIES if (self.torch / "lib" / f"lib{name}.so").exists()]
            self.link([NVCC, "-cudart", "static"], objects, libraries, output)
        else:
            self.link([*COMPILER, *USERS_FLAGS], objects, TORCH_LIBRARIES[:1], output)

    def objects(self) -> list[Object]:
        """All objects in link order. Where several share an inline function of the C++ library the linker
        keeps the first body, so the least capable come first: their code is legal on every processor.
        """
        variants = self.variants()
        have = [f"-DFK_HAVE_{name.upper()}=1" for name in variants]
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name != "kernels.cpp":
                extra = self.stable_abi if source.name == "bindings.cpp" else []
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

    def object(self, source: Path, name: str, *flags: str, folder: Path | None = None) -> Object:
        folder = folder or made_folder("objects-emulated" if self.emulate else "objects")
        output = folder / f"{name}.o"
        emulate = ["-DFK_EMULATE=1"] if self.emulate else []
        command = [*COMPILER, *FLAGS.split(), *emulate, *flags, *USERS_FLAGS]
        command += ["-MD", "-c", str(source), "-o", str(output)]
        return Object(source, output, command)

    def cuda_objects(self) -> list[Object]:
        """The kernels for every architecture, by nvcc, and the bindings by the C++ compiler."""
        archs = cuda_archs()
        targets, ptx = cuda_targets(archs)
        folder = made_folder(f"objects-cuda-{'-'.join(archs)}")
        built = f"{nvcc_version()}; {NVCC_FLAGS}; sm_{', sm_'.join(archs)} and PTX of {ptx}"
        flags = ["-DUSE_CUDA", f'-DFK_BUILD="{built}"', *self.stable_abi]
        objects = [self.object(CUDA_SOURCES / "bindings.cpp", "bindings", *flags, folder=folder)]
        for source in sorted(CUDA_SOURCES.glob("*.cu")):
            output, depends = folder / f"{source.stem}.o", folder / f"{source.stem}.d"
            make = ["-MD", "-MF", str(depends), "-c", str(source), "-o", str(output)]
            objects.append(Object(source, output, [NVCC, *NVCC_FLAGS.split(), *targets, *make]))
        return objects

    def emulated_objects(self) -> list[Object]:
        """The same sources as C++ for this processor."""
        folder = made_folder("objects-emulated-cuda")
        flags = ["-DFK_EMULATE=1", '-DFK_BUILD="emulated on the processor"', "-march=native"]
        # The last: g++ 12 warns of arrays that are set to 0 where they are declared.
        flags += ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
        bindings = CUDA_SOURCES / "bindings.cpp"
        sources = [*sorted(CUDA_SOURCES.glob("*.cu")), CUDA_SOURCES / "host" / "emulation.cpp"]
        objects = [self.object(bindings, "bindings", *flags, *self.stable_abi, folder=folder)]
        return objects + [
            self.object(source, source.stem, *flags, "-x", "c++", folder=folder) for source in sources
        ]

    def link(self, linker: list[str], objects: list[Object], libraries: Sequence[str], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [str(one.output) for one in objects]
        # Python loads libtorch privately: only a library that names it finds its symbols.
        torch = ["-L", str(self.torch / "lib"), *(f"-l{library}" for library in libraries)]
        if error := run([*linker, "-shared", *inputs, *torch, "-o", str(output)]):
            raise SystemExit(f"flamingo_kernels: {output.name} does not link: {error}")


class Wheel(bdist_wheel):
    """A wheel that any Python from 3.10 on takes, when it holds the extension.

    Free-threaded Pythons have no abi3: a wheel made by one is for its version alone.
    """

    def finalize_options(self) -> None:
        abi3 = self.distribution.ext_modules and not sysconfig.get_config_var("Py_GIL_DISABLED")
        self.py_limited_api = "cp310" if abi3 else None
        super().finalize_options()

    def run(self) -> None:
        """Leaves the kernels in this checkout too: who works in it imports its package, not the installed."""
        super().run()
        build = self.get_finalized_command("build_ext")
        for extension in self.distribution.ext_modules or ():
            here = Path(build.get_ext_filename(extension.name))
            here.unlink(missing_ok=True)  # not overwritten, as a process may have it loaded
            here.with_name(f"{here.name}.failed").unlink(missing_ok=True)
            shutil.copy2(build.get_ext_fullpath(extension.name), here)


COMPILER = find_compiler()
NVCC = os.environ.get("NVCC", "nvcc")
EXTENSION = Extension(
    "flamingo_kernels._C",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    # with what CUDA's build reads, as a source archive holds these files whatever is built
    depends=sorted(
        map(
            str,
            (
                *SHARED.glob("*.h"),
                *SOURCES.glob("*.h"),
                *CUDA_SOURCES.glob("*.*"),
                *CUDA_SOURCES.glob("host/*"),
            ),
        )
    ),
)

CUDA_EXTENSION = Extension(
    "flamingo_kernels._C_cuda",
    sources=sorted(map(str, (CUDA_SOURCES / "bindings.cpp", *CUDA_SOURCES.glob("*.cu")))),
    depends=sorted(map(str, (*SHARED.glob("*.h"), *CUDA_SOURCES.glob("*.h"), *CUDA_SOURCES.glob("host/*")))),
)


def extensions() -> list[Extension]:
    if EMULATE == "cuda":
        return [CUDA_EXTENSION]
    wanted = choose_build(COMPILER)
    cpu = [EXTENSION] if wanted in ("cpu", "cuda") else []
    return cpu + ([CUDA_EXTENSION] if "cuda" in wanted else [])


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
