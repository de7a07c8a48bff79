"""Reads compiled kernels: what each takes of a GPU, and whether it has the instructions it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib import util
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    name: str  # with its template arguments, as in "masked_cross_attention_fwd_kernel<bf16, 64>"
    registers: int
    stack: int  # bytes of spilled registers, and of arrays that found none
    spills: int  # instructions that access them
    products: int  # instructions of the tensor cores
    wide_loads: int  # of 16 bytes from global memory
    wide_stores: int


@cache
def tool() -> str | None:
    """The path of cuobjdump: CUDA's, or that of the Triton package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = util.find_spec("triton")
    if triton is None or triton.submodule_search_locations is None:
        return None
    bundled = Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin", "cuobjdump")
    return str(bundled) if bundled.exists() else None


def kernels(file: Path, arch: str) -> list[Kernel]:
    """The kernels of an object or a library for sm_<arch>."""
    usage = _run(tool(), "-arch", f"sm_{arch}", "-res-usage", file)
    assembly = _run(tool(), "-arch", f"sm_{arch}", "-sass", file)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", assembly, re.DOTALL))
    taken = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage)
    names = _run("c++filt", *(name for name, *_ in taken)).splitlines() if taken else []
    return [
        _kernel(_short(readable), int(registers), int(stack), code[name])
        for (name, registers, stack), readable in zip(taken, names, strict=True)
    ]


def _kernel(name: str, registers: int, stack: int, code: str) -> Kernel:
    patterns = (
        r"\b(?:LDL|STL)\b",
        r"\bHMMA\b",
        r"\b(?:LDG|LDGSTS)\.E\S*\.128",
        r"\bSTG\.E\S*\.128",
    )
    return Kernel(name, registers, stack, *(len(re.findall(pattern, code)) for pattern in patterns))


def _short(readable: str) -> str:
    """A demangled name without namespaces, return type and parameters."""
    name = re.sub(r"flamingo_kernels::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", readable)
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name.split(">(")[0] + (">" if ">(" in name else ""))


def _run(*command: str | Path | None) -> str:
    return subprocess.run([*map(str, command)], text=True, capture_output=True, check=True).stdout
