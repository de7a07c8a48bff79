"""Reads a compiled kernel: what it takes, and whether it has the instructions it should."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from tests.helpers.triton.cases import Target

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read(binary: Any, target: Target) -> dict[str, Any]:
    """Registers of a thread, shared memory, spilled registers, matrix instructions, wide accesses.

    `spilled` is 0 where nothing is; `spilled_in_loops` counts what a loop writes to the stack.
    """
    facts = _read_amd(binary) if target.backend == "hip" else _read_nvidia(binary)
    return {**facts, "shared": binary.metadata.shared, "warps": binary.metadata.num_warps}


def _read_nvidia(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        assembly = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled": stack + local + _count(r"\b(?:LDL|STL)\b", assembly),
        "spilled_in_loops": sum(_count(r"\bSTL\b", loop) for loop in _loops(assembly)),
        "matrix": _count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", assembly),
        "loads": _count(r"\b(?:LDG|LDGSTS)\b", assembly),
        "wide_loads": _count(r"\b(?:LDG|LDGSTS)\.E\S*\.128", assembly),
        "stores": _count(r"\bSTG\b", assembly),
        "wide_stores": _count(r"\bSTG\.E\S*\.128", assembly),
    }


def _loops(assembly: str) -> list[str]:
    """The bodies of all loops: from a label to a branch back to it."""
    ends = re.finditer(r"\bBRA\b[^;]*`\((\.L_x_\d+)\)", assembly)
    begins = {found[1]: found.start() for found in re.finditer(r"^(\.L_x_\d+):", assembly, re.MULTILINE)}
    return [assembly[begins[each[1]] : each.start()] for each in ends if begins[each[1]] < each.start()]


def _read_amd(binary: Any) -> dict[str, Any]:
    assembly = binary.asm["amdgcn"]
    spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        "spilled": sum(map(int, spills)),
        "spilled_in_loops": sum(map(int, spills)),
        "matrix": _count(r"\bv_mfma", assembly),
        "loads": _count(r"\b(?:global|buffer)_load_", assembly),
        "wide_loads": _count(r"\b(?:global|buffer)_load_dwordx4", assembly),
        "stores": _count(r"\b(?:global|buffer)_store_", assembly),
        "wide_stores": _count(r"\b(?:global|buffer)_store_dwordx4", assembly),
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
