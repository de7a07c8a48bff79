"""The operators' tests with kernels that watch what they do: `make sanitize`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.scratch import Run, Scratch

# Triton's kernels are not compiled here, the reference has none. Sanitizers want all memory to themselves.
TESTS = (
    "tests/flamingo_kernels/ops",
    "tests/flamingo_kernels/sublayers",
    "tests/flamingo_kernels/layers",
    "-k",
    "not triton and not reference and not without_memory",
    *("--numprocesses", "auto", "--dist", "loadfile"),
)
# How a report names what it is about: UBSan in its first line, the others in their last.
PLACE = re.compile(r"SUMMARY: (.*)|(\S+: runtime error: .*)")


@dataclass(frozen=True)
class Sanitizer:
    """One of the compiler's.

    Attributes:
        flags: of the compiler.
        library: of its own that must be loaded first, or nothing.
        variable, options: what tells the library to go on after a report.
        cuda: whether it can follow the emulated threads of a GPU, which share a thread of the processor.
    """

    flags: str
    library: str
    variable: str
    options: str
    cuda: bool = True


SANITIZERS = {
    "address": Sanitizer(
        flags="-fsanitize=address -fsanitize-recover=address",
        library="libasan.so",
        variable="ASAN_OPTIONS",
        options="halt_on_error=0:detect_leaks=0",  # Python and torch leave much to the end of the process
    ),
    "undefined": Sanitizer(
        flags="-fsanitize=undefined,float-cast-overflow",
        library="",
        variable="UBSAN_OPTIONS",
        options="print_stacktrace=0",
    ),
    "thread": Sanitizer(
        flags="-fsanitize=thread -DFK_OWN_THREADS",
        library="libtsan.so",
        variable="TSAN_OPTIONS",
        options="halt_on_error=0:ignore_noninstrumented_modules=1",  # torch is not compiled so
        cuda=False,
    ),
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def preloaded(sanitizer: Sanitizer) -> str:
    """What must be loaded before all else: the sanitizer's library, and that of C++, which it looks into.

    Raises:
        RuntimeError: the compiler has none.
    """
    if not sanitizer.library:
        return ""
    paths = [_library(name) for name in (sanitizer.library, "libstdc++.so.6")]
    if not all(Path(path).is_absolute() for path in paths):
        raise RuntimeError(f"{compiler()} has no {sanitizer.library}: install it, or set CXX to one that has")
    return " ".join(paths)


def _library(name: str) -> str:
    command = [*shlex.split(compiler()), f"-print-file-name={name}"]
    return subprocess.run(command, text=True, capture_output=True).stdout.strip()


def run(scratch: Scratch, sanitizer: Sanitizer, *tests: str, **environment: str) -> tuple[Run, list[str]]:
    """Run tests of a copy with its kernels compiled anew.

    Args:
        scratch: the copy.
        sanitizer: what its kernels are compiled with.
        tests: pytest's arguments.
        environment: of the compiler and the tests.

    Returns:
        What pytest said, and each place that was reported, once.
    """
    flags = f"-O1 -g1 -fno-omit-frame-pointer {sanitizer.flags}"
    log = scratch.folder / "report"
    watching = {sanitizer.variable: f"{sanitizer.options}:log_path={log}", "LD_PRELOAD": preloaded(sanitizer)}
    with scratch.compiled(cpu=True, cuda=sanitizer.cuda, CXXFLAGS=flags, **environment) as kernels:
        done = scratch.test(*tests, **environment, **kernels, **watching)
    reports = [path.read_text(errors="replace") for path in sorted(scratch.folder.glob("report.*"))]
    return done, sorted({place for report in reports for place in _places(report)})


def _places(report: str) -> list[str]:
    return [summary or error for summary, error in PLACE.findall(report)]
